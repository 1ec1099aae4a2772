// ops.h - the classes of operations that counters, traces and mutations speak of.
#pragma once

namespace nsa_sel::emu {

enum Op : int {
  kLdg,          // global loads
  kStg,          // global stores
  kLds,          // shared loads
  kSts,          // shared stores
  kLdgsts,       // cp.async, its global side
  kLdgstsStore,  // cp.async, its shared side
  kLdsm,         // ldmatrix
  kLdsRemote,    // loads from another block of the cluster
  kBulk,         // bulk copies
  kAtom,         // global atomics
  kShfl,         // shuffles and votes
  kMovm,         // movmatrix
  kMma,
  kBar,  // __syncthreads and named barriers
  kWarpsync,
  kMbarWait,
  kMbarArrive,
  kCpAsyncArrive,
  kWait,  // cp.async.wait_all
  kFence,
  kCluster,  // cluster barrier, arrive and wait
  kGridDep,  // griddepcontrol.wait
  kNumOps,
};

constexpr const char* kOpNames[kNumOps] = {
    "LDG",  "STG",   "LDS",     "STS",    "LDGSTS", "LDGSTS_ST", "LDSM",      "LDS_REMOTE",  "BULK",
    "ATOM", "SHFL",  "MOVM",    "MMA",    "BAR",    "WARPSYNC",  "MBAR_WAIT", "MBAR_ARRIVE", "CP_ASYNC_ARRIVE",
    "WAIT", "FENCE", "CLUSTER", "GRIDDEP"};

}  // namespace nsa_sel::emu
