// ops_control.cpp - branches, convergence of lanes, and the barriers at which warps and blocks meet.
#include <algorithm>

#include "decode.h"

namespace mc {
namespace {

int target_pc(Decoder& x) { return int(x.number() / 16); }

// .DIV jumps where lanes of the mask are missing, .CONV where none is; .U.ANY where the predicate holds for some lane.
const Opcode bra({"BRA"}, {"DIV", "CONV", "U", "ANY"}, [](Decoder& x) -> Execute {
  if (!x.has("DIV") && !x.has("CONV")) {
    if (x.next_is_predicate()) {  // a second condition beside the guard
      const PredicateSource p = x.predicate();
      const int to = target_pc(x);
      return [=](Warp& w, Mask m) {
        if (const Mask taken = p(w) & m; taken != 0) w.jump(to, taken);
      };
    }
    const int to = target_pc(x);
    if (x.has("U")) return [to](Warp& w, Mask) { w.jump(to, w.mask); };  // some lane's predicate takes all along
    return [to](Warp& w, Mask m) { w.jump(to, m); };
  }
  const bool when_whole = x.has("CONV");
  const Source wanted = x.source();
  const int to = target_pc(x);
  return [=](Warp& w, Mask m) {
    const Mask whole = wanted(w)[0];
    if ((w.mask == whole) == when_whole) w.jump(to, m);
  };
});

const Opcode call({"CALL"}, {"REL", "NOINC", "ABS"}, [](Decoder& x) -> Execute {
  const int to = target_pc(x);
  return [to](Warp& w, Mask m) { w.jump(to, m); };
});

// Lanes may return to different places.
const Opcode ret({"RET"}, {"REL", "NODEC", "ABS"}, [](Decoder& x) -> Execute {
  const Source low = x.source();
  const uint32_t base = x.number();  // of the kernel: 0
  return [=](Warp& w, Mask m) {
    const Lanes to = low(w);
    while (m != 0) {
      const uint32_t where = to[first_lane(m)];
      Mask together = 0;
      each(m, [&](int i) { together |= Mask(to[i] == where) << i; });
      m &= ~together;
      w.jump(int((where + base) / 16), together);
    }
  };
});

int convergence(Decoder& x) {
  const std::string name = x.text();
  if (name.size() < 2 || name[0] != 'B') throw Unknown("convergence barrier " + name);
  const int n = std::stoi(name.substr(1));
  if (n > 15) throw Unknown("convergence barrier " + name);
  return n;
}

const Opcode bssy({"BSSY"}, {"RECONVERGENT"}, [](Decoder& x) -> Execute {
  const int n = convergence(x), to = target_pc(x);
  return [=](Warp& w, Mask m) { w.B[size_t(n)] = {m, to}; };
});

const Opcode break_({"BREAK"}, {}, [](Decoder& x) -> Execute {
  const int n = convergence(x);
  return [n](Warp& w, Mask m) {
    w.B[size_t(n)].members &= ~m;
    w.release();
  };
});

const Opcode bsync({"BSYNC"}, {"RECONVERGENT"}, [](Decoder& x) -> Execute {
  const int n = convergence(x);
  return [n](Warp& w, Mask m) {
    if (m != w.mask) w.fault("BSYNC of some lanes only");
    w.gather({n, 0, m, w.B[size_t(n)].target});
  };
});

// Lanes of the mask meet here. A collective form, on the path of a diverged warp, is followed by one instruction for
// all of them.
const Opcode warpsync({"WARPSYNC"}, {"ALL", "COLLECTIVE"}, [](Decoder& x) -> Execute {
  const bool all = x.has("ALL") || !x.more();
  const Source mask = all ? Source{} : x.source();
  return [=](Warp& w, Mask m) {
    const Mask members = all ? kAll : mask(w)[first_lane(m)];
    if ((m & w.alive) != (members & w.alive)) w.gather({-1 - w.pc, members, m, w.pc + 1});
  };
});

const Opcode exit_({"EXIT"}, {}, [](Decoder&) -> Execute { return [](Warp& w, Mask m) { w.exit(m); }; });

const Opcode nothing({"NOP", "YIELD", "PREEXIT", "MEMBAR", "CCTL", "CGAERRBAR", "ERRBAR", "FENCE", "ACQBULK",
                      "ENDCOLLECTIVE"},
                     {"ALL", "CTA", "GPU", "SYS", "SC", "IVALL", "VIEW", "ASYNC", "S", "PARTIAL"},
                     [](Decoder&) -> Execute { return [](Warp&, Mask) {}; });

constexpr double kClocksPerNanosecond = 1.41;  // of an A100; only code below sm_90 sleeps

const Opcode nanosleep({"NANOSLEEP"}, {}, [](Decoder& x) -> Execute {
  const uint32_t ns = x.number();
  return [ns](Warp& w, Mask) {
    w.clock += ns * kClocksPerNanosecond;
    w.polling = w.pc;
    ++w.pc, w.moved = true;
    w.rotate();
  };
});

// ---- mbarriers
// -------------------------------------------------------------------------------------------------------

uint32_t one_offset(Warp& w, const Address& address, Mask m) {
  uint64_t at[32];
  address(w, at);
  const uint64_t first = at[first_lane(m)];
  each(m, [&](int i) {
    if (at[i] != first) w.fault("lanes at different mbarriers");
  });
  return w.block.offset_of(first & 0xffffffffu);
}

const Opcode syncs({"SYNCS"}, {"EXCH", "64", "ARRIVE", "TRANS64", "A1T0", "PHASECHK", "TRYWAIT"},
                   [](Decoder& x) -> Execute {
                     if (x.has("EXCH")) {  // low word of the value: (0x100000 - count) << 1
                       x.target();
                       const Address address = x.address();
                       const Source value = x.source(2);
                       return [=](Warp& w, Mask m) {
                         const int count = 0x100000 - int(value.raw(w, 0) >> 1);
                         if (count <= 0 || count >= 0x100000) w.fault("mbarrier of count " + std::to_string(count));
                         const uint32_t offset = one_offset(w, address, m);
                         const uint64_t bits = value.raw(w, 0) | uint64_t(value.raw(w, 1)) << 32;
                         w.block.shared.write(offset, &bits, 8);
                         w.block.barriers[offset] = Barrier{count, count, 0, 0, {}};
                       };
                     }
                     if (x.has("ARRIVE")) {  // A1T0: one arrival; otherwise an arrival that announces bytes
                       x.text();
                       const Address address = x.address();
                       const bool announces = !x.has("A1T0");
                       const Source bytes = announces ? x.source() : Source{};
                       return [=](Warp& w, Mask m) {
                         const uint32_t offset = one_offset(w, address, m);
                         w.block.arrive(offset, __builtin_popcount(m),
                                        announces ? int64_t(bytes(w)[first_lane(m)]) : 0);
                       };
                     }
                     const PredicateTarget completed = x.predicate_target();
                     const Address address = x.address();
                     const Source parity = x.source();
                     const bool sleeps = x.has("TRYWAIT");
                     return [=](Warp& w, Mask m) {
                       Barrier& b = w.block.barrier(one_offset(w, address, m));
                       const int wanted = int(parity(w)[first_lane(m)] >> 31);
                       const bool done = b.phase != wanted;
                       completed.put(w, done || sleeps ? kAll : 0, m);
                       if (done || !sleeps) return;
                       b.waiting.push_back(&w);
                       w.sleeping = true;
                     };
                   });

const Opcode atoms({"ATOMS"}, {"ARRIVE", "64"}, [](Decoder& x) -> Execute {
  if (!x.has("ARRIVE")) throw Unknown("atomic other than an arrival");
  if (!x.target(2).discarded()) throw Unknown("state of an arrival");
  const Address address = x.address();
  return [=](Warp& w, Mask m) { w.block.arrive(one_offset(w, address, m), __builtin_popcount(m)); };
});

// ---- Barriers of a block and of a cluster
// ----------------------------------------------------------------------------

const Opcode bar({"BAR"}, {"SYNC", "DEFER_BLOCKING"}, [](Decoder& x) -> Execute {
  const Source number = x.source();
  const bool counted = x.more();
  const Source threads = counted ? x.source() : Source{};
  const bool packed = threads.kind != Source::kValue;  // a register holds the threads above 16 bits
  return [=](Warp& w, Mask m) {
    Block& block = w.block;
    const int n = int(number(w)[first_lane(m)] & 15);
    int wanted = int(threads(w)[first_lane(m)]);
    if (packed) wanted >>= 16;
    if (!counted || wanted == 0) wanted = 32 * int(block.warps.size());
    std::vector<Warp*>& here = block.named[n];
    if (std::find(here.begin(), here.end(), &w) != here.end())
      w.fault("one warp twice at barrier " + std::to_string(n));
    here.push_back(&w);
    w.sleeping = true;
    if (int(here.size()) * 32 < wanted) return;
    const std::vector<Warp*> everybody = std::move(here);
    here.clear();
    Launch& launch = block.launch;
    launch.progress = w.issued;
    ++launch.barriers;
    launch.at(w.issued + 5, [everybody, &launch] {  // 25 clocks with those of waking up
      for (Warp* v : everybody) v->wake(launch.now);
    });
  };
});

const Opcode cluster_arrive({"UCGABAR_ARV"}, {}, [](Decoder&) -> Execute {
  return [](Warp& w, Mask) {
    Launch& launch = w.block.launch;
    ++w.cluster_arrivals;
    if (++launch.cluster_arrived < launch.cluster_warps) return;
    launch.cluster_arrived = 0;
    ++launch.cluster_phase;
    launch.progress = launch.cluster_completed = w.issued;
    const double resume = w.issued + launch.model.cluster_barrier - 20;
    const std::vector<Warp*> everybody = std::move(launch.cluster_waiting);
    launch.cluster_waiting.clear();
    launch.at(resume, [everybody, &launch] {
      for (Warp* v : everybody) v->wake(launch.now);
    });
  };
});

const Opcode cluster_wait({"UCGABAR_WAIT"}, {}, [](Decoder&) -> Execute {
  return [](Warp& w, Mask) {
    Launch& launch = w.block.launch;
    if (w.cluster_arrivals == 0) w.fault("waits at the cluster's barrier without having arrived");
    if (launch.cluster_phase >= w.cluster_arrivals) {
      w.hold = std::max(w.hold, launch.cluster_completed + launch.model.cluster_barrier);
      return;
    }
    launch.cluster_waiting.push_back(&w);
    w.sleeping = true;
  };
});

}  // namespace
}  // namespace mc
