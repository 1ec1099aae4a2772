// fragments.cu - right kernels whose results and costs are known beforehand: layouts of the matrix instructions,
// shuffles, votes, arithmetic built-ins, and memory patterns with a known number of wavefronts and sectors.
#include "fault.h"

namespace nsa_sel::faults {

struct Words {
  const void* a;
  const void* b;
  void* out;
  int mode;
};

__global__ void ldmatrix(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* rows = dev::smem_at<uint4>(raw, 0, 32, "rows");
  const int lane = int(threadIdx.x);
  dev::store(rows + lane, dev::load(static_cast<const uint4*>(p.a) + lane));
  __syncwarp();
  uint32_t r[4];
  if (p.mode) {
    dev::ldmatrix_x4_trans(r, rows + lane);
  } else {
    dev::ldmatrix_x4(r, rows + lane);
  }
  for (int i = 0; i < 4; ++i) dev::store(static_cast<uint32_t*>(p.out) + lane * 4 + i, r[i]);
}

__global__ void mma(const __grid_constant__ Words p) {
  const int lane = int(threadIdx.x);
  const uint32_t* words = static_cast<const uint32_t*>(p.a) + lane * 4;
  const uint32_t a[4] = {dev::load(words), dev::load(words + 1), dev::load(words + 2), dev::load(words + 3)};
  const uint2 b = dev::load(static_cast<const uint2*>(p.b) + lane);
  float* out = static_cast<float*>(p.out) + lane * 4;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = dev::load(out + i);
  if (p.mode) {
    dev::mma_m16n8k16<__nv_bfloat16>(d, a, b.x, b.y);
  } else {
    dev::mma_m16n8k16<__half>(d, a, b.x, b.y);
  }
  for (int i = 0; i < 4; ++i) dev::store(out + i, d[i]);
}

__global__ void movmatrix(const __grid_constant__ Words p) {
  const int lane = int(threadIdx.x);
  const uint32_t v = dev::load(static_cast<const uint32_t*>(p.a) + lane);
  dev::store(static_cast<uint32_t*>(p.out) + lane, dev::movmatrix_trans(v));
}

// One row of 32 results for each form of shuffle and vote.
__global__ void shuffles(const __grid_constant__ Words p) {
  const int lane = int(threadIdx.x);
  const int v = dev::load(static_cast<const int*>(p.a) + lane);
  const long long wide = (static_cast<long long>(v) << 32) + lane;
  int row = 0;
  const auto put = [&](int value) { dev::store(static_cast<int*>(p.out) + row++ * 32 + lane, value); };
  put(__shfl_sync(~0u, v, 5));
  put(__shfl_sync(~0u, v, lane + 3, 8));
  put(__shfl_xor_sync(~0u, v, 9));
  put(__shfl_up_sync(~0u, v, 4));
  put(__shfl_down_sync(~0u, v, 4, 16));
  put(int(__shfl_xor_sync(~0u, wide, 16) >> 32));
  put(int(__shfl_xor_sync(~0u, float(v), 1)));
  put(int(__ballot_sync(~0u, v & 1)));
  put(__any_sync(~0u, lane == 7));
  put(__all_sync(~0u, lane < 31));
  if (lane < 16) put(__shfl_xor_sync(0xffffu, v, 15));
}

__global__ void arithmetic(const __grid_constant__ Words p) {
  const int lane = int(threadIdx.x);
  const unsigned v = dev::load(static_cast<const unsigned*>(p.a) + lane);
  const unsigned w = dev::load(static_cast<const unsigned*>(p.b) + lane);
  int row = 0;
  const auto put = [&](unsigned value) { dev::store(static_cast<unsigned*>(p.out) + row++ * 32 + lane, value); };
  put(unsigned(__popc(v)));
  put(unsigned(__ffs(int(v))));
  put(unsigned(__clz(int(v))));
  put(__umulhi(v, w));
  put(min(v, w));
  put(unsigned(max(int(v), int(w))));
  put(__float_as_uint(dev::exp2_approx(-float(lane) * 5.0f)));
}

// Shared-memory and global patterns; the test knows what each costs.
__global__ void patterns(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 1024, "a");
  const int lane = int(threadIdx.x);
  const float* in = static_cast<const float*>(p.a);
  float* out = static_cast<float*>(p.out);
  float sum = 0.0f;
  switch (p.mode) {
    case 0:
      dev::store(a + lane, 1.0f);
      break;  // one wavefront
    case 1:
      dev::store(a + lane * 2, 1.0f);
      break;  // two: even banks only
    case 2:
      dev::store(a + lane * 32, 1.0f);
      break;  // 32: one bank
    case 3:
      dev::store(reinterpret_cast<float4*>(a) + lane, float4{});
      break;  // four, all needed
    case 4:
      dev::store(reinterpret_cast<float4*>(a) + lane * 8, float4{});
      break;  // 32 instead of four
    case 5:
      dev::store(reinterpret_cast<float2*>(a) + lane, float2{});
      break;  // two, both needed
    case 6:
      if (lane < 4) dev::store(a + lane * 32, 1.0f);  // four lanes, one bank
      break;
    case 7:
      sum = dev::load(in + lane);
      break;  // 4 sectors
    case 8:
      sum = dev::load(in + lane * 8);
      break;  // 32 sectors
    case 9:
      sum = dev::load(reinterpret_cast<const float4*>(in) + lane).x;
      break;  // 16 sectors
    case 10:
      sum = dev::load(in);
      break;  // one sector
    case 11:
      dev::cp_async_16(a + lane * 4, in + lane * 4, true);  // four wavefronts
      dev::cp_async_wait_all();
      break;
    case 12:
      dev::cp_async_16(a + lane * 32, in + lane * 4, lane < 8);  // 32, all on one bank
      dev::cp_async_wait_all();
      break;
    default:
      for (int i = 0; i < lane; ++i) dev::store(a + lane, float(i));  // 31 requests, fewer lanes each
  }
  dev::store(out + lane, sum);
}

// Two warps drift apart on purpose; what they cost may not depend on how.
__global__ void drifting(const __grid_constant__ Words p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 256, "a");
  const int t = int(threadIdx.x), lane = t & 31, warp = t >> 5;
  const float* in = static_cast<const float*>(p.a);
  float sum = 0.0f;
  for (int i = 0; i < 4 + 3 * warp; ++i) {
    if ((lane + i) % 3) a[t] = dev::load(in + (t * 7 + i * 31) % 512);
    if (lane < 16) __syncwarp(0xffffu);
    if (lane % 2) sum += float(i);
    sum += __shfl_xor_sync(~0u, sum, 1);
    __syncwarp();
  }
  dev::store(static_cast<float*>(p.out) + t, sum);
}

}  // namespace nsa_sel::faults

#define NSA_SEL_ENTRY(name, threads)                                                                                   \
  extern "C" int run_##name(const void* a, const void* b, void* out, int mode) {                                       \
    using namespace nsa_sel;                                                                                           \
    return dev::launch_kernel(faults::name, faults::Shape{1, threads, 8192}, faults::Words{a, b, out, mode}, nullptr); \
  }
NSA_SEL_ENTRY(ldmatrix, 32)
NSA_SEL_ENTRY(mma, 32)
NSA_SEL_ENTRY(movmatrix, 32)
NSA_SEL_ENTRY(shuffles, 32)
NSA_SEL_ENTRY(arithmetic, 32)
NSA_SEL_ENTRY(patterns, 32)
NSA_SEL_ENTRY(drifting, 128)
