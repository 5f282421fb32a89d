// Winograd's convolution in the vectors of one instruction set; convolution.cpp includes this once
// for each, in a namespace of its own, with PYADV_TARGET (the attribute of its functions), kLanes,
// kRows, Lanes, splat(s) and fma(a, b, c) = a b + c defined. Generic vectors in a function that is
// compiled for several sets would be cut to the smallest of them.

constexpr int kVectors = 2;  // of a row of products, in registers
constexpr int kStrip = kVectors * kLanes;

PYADV_TARGET inline Lanes load(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PYADV_TARGET inline void store(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

// B^T d for one line of six values, `from` and `to` in steps.
PYADV_TARGET inline void transform_input(const Lanes* d, int from, Lanes* t, int to) {
  const Lanes d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from],
              d5 = d[5 * from];
  const Lanes near2 = splat(-kNear2), far2 = splat(-kFar2), sum2 = splat(-kSum2),
              product2 = splat(kProduct2);
  const Lanes near_even = fma(far2, d2, d4), near_odd = fma(far2, d1, d3);
  const Lanes far_even = fma(near2, d2, d4), far_odd = fma(near2, d1, d3);
  t[0] = fma(product2, d0, fma(sum2, d2, d4));
  t[to] = fma(splat(kNear), near_odd, near_even);
  t[2 * to] = fma(splat(-kNear), near_odd, near_even);
  t[3 * to] = fma(splat(kFar), far_odd, far_even);
  t[4 * to] = fma(splat(-kFar), far_odd, far_even);
  t[5 * to] = fma(product2, d1, fma(sum2, d3, d5));
}

// A^T m for one line of six values: four.
PYADV_TARGET inline void transform_output(const Lanes* m, int from, Lanes* y, int to) {
  const Lanes m0 = m[0], m1 = m[from], m2 = m[2 * from], m3 = m[3 * from], m4 = m[4 * from],
              m5 = m[5 * from];
  const Lanes near_even = m1 + m2, near_odd = m1 - m2, far_even = m3 + m4, far_odd = m3 - m4;
  y[0] = (m0 + near_even) + far_even;
  y[to] = fma(splat(kNear), near_odd, splat(kFar) * far_odd);
  y[2 * to] = fma(splat(kNear2), near_even, splat(kFar2) * far_even);
  y[3 * to] = fma(splat(kNear * kNear2), near_odd, fma(splat(kFar * kFar2), far_odd, m5));
}

// v[point][row of step `step`][channel] for one tile.
PYADV_TARGET inline void gather(const WinogradArgs& a, int64_t tile, const float* zeros, float* v,
                                int64_t plane) {
  const int64_t per_image = a.tiles_down * a.tiles_across, place = tile % per_image;
  const int64_t top = place / a.tiles_across * kTile - a.padding,
                left = place % a.tiles_across * kTile - a.padding;
  const float* image = a.x + tile / per_image * (a.height * a.width * a.inputs);
  const float* pixel[kPoints];
  for (int i = 0; i < kPatch; ++i) {
    for (int j = 0; j < kPatch; ++j) {
      const int64_t row = top + i, column = left + j;
      const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      pixel[i * kPatch + j] = inside ? image + (row * a.width + column) * a.inputs : zeros;
    }
  }
  for (int64_t c = 0; c < a.inputs; c += kLanes) {
    Lanes d[kPoints], t[kPoints];
    const int64_t rest = a.inputs - c;
    if (rest >= kLanes) {
      for (int k = 0; k < kPoints; ++k) d[k] = load(pixel[k] + c);
    } else {
      for (int k = 0; k < kPoints; ++k) {
        d[k] = splat(0.0f);
        std::memcpy(&d[k], pixel[k] + c, static_cast<size_t>(rest) * sizeof(float));
      }
    }
    for (int j = 0; j < kPatch; ++j) transform_input(d + j, kPatch, t + j, kPatch);
    for (int i = 0; i < kPatch; ++i) transform_input(t + i * kPatch, 1, d + i * kPatch, 1);
    for (int k = 0; k < kPoints; ++k) store(v + k * plane + c, d[k]);
  }
}

// m[row][strip] = sum over channels of v[row][channel] u[channel][strip]. The sum runs in the order
// of the channels for any number of rows, so a tile's result does not depend on its company.
template <int R>
PYADV_TARGET inline void multiply(const float* v, int64_t step, const float* u, int64_t channels,
                                  float* m) {
  Lanes sum[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kVectors; ++s) sum[r][s] = splat(0.0f);
  for (int64_t c = 0; c < channels; ++c, u += kPanel) {
    Lanes w[kVectors];
    for (int s = 0; s < kVectors; ++s) w[s] = load(u + s * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes value = splat(v[r * step + c]);
      for (int s = 0; s < kVectors; ++s) sum[r][s] = fma(value, w[s], sum[r][s]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kVectors; ++s) store(m + r * kPanel + s * kLanes, sum[r][s]);
}

PYADV_TARGET inline void multiply_rows(const float* v, int64_t step, int64_t rows, const float* u,
                                       int64_t channels, float* m) {
  for (int strip = 0; strip < kPanel; strip += kStrip) {
    int64_t r = 0;
    for (; rows - r >= kRows; r += kRows)
      multiply<kRows>(v + r * step, step, u + strip, channels, m + r * kPanel + strip);
    for (; rows - r >= 4; r += 4)
      multiply<4>(v + r * step, step, u + strip, channels, m + r * kPanel + strip);
    for (; rows - r >= 2; r += 2)
      multiply<2>(v + r * step, step, u + strip, channels, m + r * kPanel + strip);
    for (; r < rows; ++r)
      multiply<1>(v + r * step, step, u + strip, channels, m + r * kPanel + strip);
  }
}

// The output pixels of one tile for the channels of one panel.
PYADV_TARGET inline void scatter(const WinogradArgs& a, int64_t tile, int64_t panel, const float* m,
                                 int64_t plane) {
  const int64_t per_image = a.tiles_down * a.tiles_across, place = tile % per_image;
  const int64_t top = place / a.tiles_across * kTile, left = place % a.tiles_across * kTile;
  const int64_t first = panel * kPanel;
  const int64_t rows = std::min<int64_t>(kTile, a.out_height - top),
                columns = std::min<int64_t>(kTile, a.out_width - left),
                channels = std::min<int64_t>(kPanel, a.outputs - first);
  float* image = a.out + tile / per_image * (a.out_height * a.out_width * a.outputs) + first;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t rest = channels - c;
    Lanes d[kPoints], t[kTile * kPatch], y[kTile * kTile];
    for (int k = 0; k < kPoints; ++k) d[k] = load(m + k * plane + c);
    for (int j = 0; j < kPatch; ++j) transform_output(d + j, kPatch, t + j, kPatch);
    for (int i = 0; i < kTile; ++i) transform_output(t + i * kPatch, 1, y + i * kTile, 1);
    Lanes bias = splat(0.0f);
    const size_t bytes = static_cast<size_t>(std::min<int64_t>(rest, kLanes)) * sizeof(float);
    if (a.bias != nullptr) std::memcpy(&bias, a.bias + first + c, bytes);
    for (int64_t i = 0; i < rows; ++i) {
      float* to = image + ((top + i) * a.out_width + left) * a.outputs + c;
      for (int64_t j = 0; j < columns; ++j, to += a.outputs) {
        const Lanes value = y[i * kTile + j] + bias;
        if (rest >= kLanes)
          store(to, value);
        else
          std::memcpy(to, &value, bytes);
      }
    }
  }
}

// The tiles [begin, end), a block of them at a time, small enough for the cache.
PYADV_TARGET inline void convolve(const WinogradArgs& a, int64_t begin, int64_t end, int64_t block,
                                  float* room) {
  const int64_t step = padded_row(a.inputs);
  const int64_t v_plane = block * step + kLineFloats, m_plane = block * kPanel + kLineFloats;
  float* const zeros = room;
  float* const v = zeros + step;
  float* const m = v + kPoints * v_plane;
  std::fill(zeros, zeros + step, 0.0f);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t tiles = std::min(block, end - first);
    for (int64_t t = 0; t < tiles; ++t) gather(a, first + t, zeros, v + t * step, v_plane);
    const float* u = a.weight;
    for (int64_t p = 0; p < panels_of(a.outputs); ++p) {
      for (int k = 0; k < kPoints; ++k, u += a.inputs * kPanel)
        multiply_rows(v + k * v_plane, step, tiles, u, a.inputs, m + k * m_plane);
      for (int64_t t = 0; t < tiles; ++t) scatter(a, first + t, p, m + t * kPanel, m_plane);
    }
  }
}
