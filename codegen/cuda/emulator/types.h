// The number and vector types of CUDA C++ that kernels use, for an ordinary C++ compiler.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>

static inline float bw_bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t bw_float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float bw_half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 31) return bw_bits_float(sign | 0x7f800000 | (m << 13));
  if (e == 0) { float f = (float)m * 0x1p-24f; return sign ? -f : f; }
  return bw_bits_float(sign | ((e + 112) << 23) | (m << 13));
}
static inline uint16_t bw_float_to_half(float f) {  // to nearest, ties to even
  uint32_t u = bw_float_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal
    float r = fabsf(f) * 0x1p24f;
    return (uint16_t)(sign | (uint32_t)nearbyintf(r));
  }
  uint32_t r = a + 0xfff + ((a >> 13) & 1);
  return (uint16_t)(sign | ((r - 0x38000000) >> 13));
}
static inline uint16_t bw_float_to_bf16(float f) {
  uint32_t u = bw_float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float bw_e4m3_to_float(unsigned char c) {  // no infinities; all bits of the rest set: NaN
  unsigned sign = (unsigned)(c & 0x80) << 24, e = (c >> 3) & 15, m = c & 7;
  if (e == 15 && m == 7) return bw_bits_float(sign | 0x7fc00000);
  if (e == 0) { float f = (float)m * 0x1p-9f; return sign ? -f : f; }
  return bw_bits_float(sign | ((e + 120) << 23) | (m << 20));
}
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF ((double)INFINITY)
#define CUDART_NAN ((double)NAN)
struct half {
  uint16_t x;
  half() = default;
  half(float f) : x(bw_float_to_half(f)) {}
  half(double f) : x(bw_float_to_half((float)f)) {}
  half(int f) : x(bw_float_to_half((float)f)) {}
  operator float() const { return bw_half_to_float(x); }
};
typedef half __half;
struct nv_bfloat16 {
  uint16_t x;
  nv_bfloat16() = default;
  nv_bfloat16(float f) : x(bw_float_to_bf16(f)) {}
  nv_bfloat16(int f) : x(bw_float_to_bf16((float)f)) {}
  operator float() const { return bw_bits_float((uint32_t)x << 16); }
};
typedef nv_bfloat16 __nv_bfloat16;
static inline half __float2half_rn(float f) { return half(f); }
static inline float __half2float(half h) { return (float)h; }
static inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }

template <class T> struct alignas(2 * sizeof(T)) Vec2 { T x, y; };
template <class T> struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Vec4 { T x, y, z, w; };
#define BW_VECTORS(name, type)                                                       \
  typedef Vec2<type> name##2; typedef Vec4<type> name##4;                             \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }             \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
BW_VECTORS(float, float)
BW_VECTORS(int, int)
BW_VECTORS(uint, unsigned)
BW_VECTORS(short, short)
BW_VECTORS(ushort, unsigned short)
BW_VECTORS(char, signed char)
BW_VECTORS(uchar, unsigned char)
BW_VECTORS(longlong, long long)
BW_VECTORS(double, double)
BW_VECTORS(half, half)

template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline int __float_as_int(float f) { return (int)bw_float_bits(f); }
static inline unsigned __float_as_uint(float f) { return bw_float_bits(f); }
static inline float __int_as_float(int i) { return bw_bits_float((uint32_t)i); }
static inline float __uint_as_float(unsigned i) { return bw_bits_float(i); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
