// memory.cu - addresses and values: out of bounds, misaligned, never written, overflowing.
#include "fault.h"

namespace nsa_sel::faults {

template <bool kFault>
__global__ void global_plain_oob(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  p.out[t + (kFault ? 129 : 0)] = 1.0f;
}

template <bool kFault>
__global__ void global_load_oob(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  const float4 v = dev::load(reinterpret_cast<const float4*>(p.in) + t + (kFault ? 129 : 128));
  dev::store(p.out + t, v.x);
}

template <bool kFault>
__global__ void global_readonly(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  dev::store(kFault ? const_cast<float*>(p.in) + t : p.out + t, 1.0f);
}

template <bool kFault>
__global__ void global_uninit(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  if (!kFault || t < 100) dev::store(p.scratch + t, 1.0f);
  dev::store(p.out + t, dev::load(p.scratch + t));
}

template <bool kFault>
__global__ void global_misaligned(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  const float4 v = dev::load(reinterpret_cast<const float4*>(p.in + t * 4 + (kFault ? 1 : 0)));
  dev::store(p.out + t, v.x);
}

template <bool kFault>
__global__ void shared_plain_oob(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  float* b = dev::smem_at<float>(raw, 512, 128, "b");  // on the device, a's overrun lands here unseen
  const int t = int(threadIdx.x);
  b[t] = 0.0f;
  a[t + (kFault ? 1 : 0)] = 1.0f;
  __syncthreads();
  p.out[t] = a[t] + b[t];
}

template <bool kFault>
__global__ void shared_oversize(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, kFault ? 3600 : 3584, 128, "a");
  const int t = int(threadIdx.x);
  dev::store(a + (t & 63), float(t));
  dev::store(p.out + t, 1.0f);
}

template <bool kFault>
__global__ void shared_overlap(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  float* b = dev::smem_at<float>(raw, kFault ? 256 : 512, 128, "b");
  const int t = int(threadIdx.x);
  dev::store(a + t, 1.0f);
  dev::store(b + t, 1.0f);
}

template <bool kFault>
__global__ void shared_uninit(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 128, "a");
  const int t = int(threadIdx.x);
  if (!kFault || t < 100) a[t] = 1.0f;
  __syncthreads();
  p.out[t] = a[t];
}

template <bool kFault>
__global__ void ldmatrix_uninit(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  uint4* rows = dev::smem_at<uint4>(raw, 0, 32, "rows");
  const int lane = int(threadIdx.x) & 31;
  if (!kFault || lane != 17) dev::store(rows + lane, uint4{0, 0, 0, 0});
  __syncwarp();
  uint32_t r[4];
  dev::ldmatrix_x4(r, rows + lane);
  dev::store(p.out + lane, float(r[0]));
}

template <bool kFault>
__global__ void shared_misaligned(const __grid_constant__ Params p) {
  NSA_SEL_DYNAMIC_SMEM(raw);
  float* a = dev::smem_at<float>(raw, 0, 132, "a");
  const int t = int(threadIdx.x);
  dev::store(a + t, 1.0f);
  __syncthreads();
  if (t < 32) {
    const float2 v = dev::load(reinterpret_cast<const float2*>(a + 2 * t + (kFault ? 1 : 0)));
    dev::store(p.out + t, v.x);
  }
}

// For UBSan: undefined, and on most machines a plausible number.
template <bool kFault>
__global__ void signed_overflow(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  int x = 0x7fffffff - t;
  if (kFault) x += int(p.in[0] * 0.0f) + 100;
  p.out[t] = float(x);
}

// For AddressSanitizer: local memory is not the emulator's.
template <bool kFault>
__global__ void local_array(const __grid_constant__ Params p) {
  const int t = int(threadIdx.x);
  float r[8];
  for (int i = 0; i < 8; ++i) r[i] = p.in[i];
  float* volatile end = r + (t & 7) + (kFault ? 8 : 0);
  p.out[t] = *end;
}

}  // namespace nsa_sel::faults

NSA_SEL_FAULT(global_plain_oob)
NSA_SEL_FAULT(global_load_oob)
NSA_SEL_FAULT(global_readonly)
NSA_SEL_FAULT(global_uninit)
NSA_SEL_FAULT(global_misaligned)
NSA_SEL_FAULT(shared_plain_oob)
NSA_SEL_FAULT(shared_oversize, 1, 32)
NSA_SEL_FAULT(shared_overlap)
NSA_SEL_FAULT(shared_uninit)
NSA_SEL_FAULT(ldmatrix_uninit, 1, 32)
NSA_SEL_FAULT(shared_misaligned)
NSA_SEL_FAULT(signed_overflow)
NSA_SEL_FAULT(local_array)
