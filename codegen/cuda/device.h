// The types that TVM's text of kernels names, for a GPU.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define int64_t long long
#define uint64_t unsigned long long
struct __align__(8) half4 { half x, y, z, w; };
static __device__ __forceinline__ half4 make_half4(half x, half y, half z, half w) { return half4{x, y, z, w}; }
