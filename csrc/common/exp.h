// exp and log without a branch, a table or a library call, so that loops over them vectorise.
// Rounding errors stay below 1 ulp (float) and 1 ulp (double); tests/ops/test_losses.py measures
// them through the ops.
#pragma once

#include "common/types.h"

namespace pyadv {

// exp(x) for x <= 0 or NaN. Results under the smallest normal number are exactly 0: denormal
// numbers would slow the sums down and change nothing in them. Reduction to |r| <= ln(2)/2 and the
// float polynomial are those of Cephes expf.
PYADV_HD float exp_nonpositive(float x) {
  const float to_integer = 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the sum
  const float shifted = x * 0x1.715476p0f + to_integer;
  const float k = shifted - to_integer;
  const float r = (x - k * 0x1.63p-1f) + k * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = (p * (r * r) + r) + 1.0f;
  const uint32_t power = (bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(to_integer)) + 127u;
  const float result = fraction * bit_cast<float>(power << 23);
  return x < -87.33654f ? 0.0f : result;
}

// The double form follows FreeBSD's e_exp.c.
PYADV_HD double exp_nonpositive(double x) {
  const double to_integer = 0x1.8p52;
  const double shifted = x * 0x1.71547652b82fep0 + to_integer;
  const double k = shifted - to_integer;
  const double high = x - k * 6.93147180369123816490e-01, low = k * 1.90821492927058770002e-10;
  const double r = high - low, rr = r * r;
  double p = 4.13813679705723846039e-08;
  p = p * rr - 1.65339022054652515390e-06;
  p = p * rr + 6.61375632143793436117e-05;
  p = p * rr - 2.77777777770155933842e-03;
  p = p * rr + 1.66666666666666019037e-01;
  const double c = r - rr * p;
  const double fraction = 1.0 - ((low - (r * c) / (2.0 - c)) - high);
  const uint64_t power = (bit_cast<uint64_t>(shifted) - bit_cast<uint64_t>(to_integer)) + 1023u;
  const double result = fraction * bit_cast<double>(power << 52);
  return x < -708.39641 ? 0.0 : result;
}

// log(x) for a finite x that is a positive normal number; NaN stays NaN. Both forms follow
// FreeBSD's e_logf.c and e_log.c: x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
PYADV_HD float log_normal(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) + (0x3F800000u - 0x3F3504F3u);
  const float k = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float f = bit_cast<float>((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, w = z * z;
  const float rest =
      z * (0xAAAAAA.0p-24f + w * 0x91E9EE.0p-25f) + w * (0xCCCE13.0p-25f + w * 0xF89E26.0p-26f);
  const float half_square = 0.5f * f * f;
  const float log_fraction = s * (half_square + rest) + k * 9.0580006145e-06f - half_square + f;
  return log_fraction + k * 6.9313812256e-01f + (x - x);
}

PYADV_HD double log_normal(double x) {
  const uint64_t root = uint64_t{0x3FE6A09E} << 32;
  const uint64_t bits = bit_cast<uint64_t>(x) + ((uint64_t{0x3FF00000} << 32) - root);
  const double k = static_cast<double>(static_cast<int32_t>(bits >> 52) - 1023);
  const double f = bit_cast<double>((bits & 0x000FFFFFFFFFFFFFu) + root) - 1.0;
  const double s = f / (2.0 + f), z = s * s, w = z * z;
  const double odd = w * (3.999999999940941908e-01 +
                          w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double even = z * (6.666666666666735130e-01 +
                           w * (2.857142874366239149e-01 +
                                w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const double half_square = 0.5 * f * f;
  const double log_fraction =
      s * (half_square + (odd + even)) + k * 1.90821492927058770002e-10 - half_square + f;
  return log_fraction + k * 6.93147180369123816490e-01 + (x - x);
}

}  // namespace pyadv
