// Winograd's convolution with the vectors of one instruction set. convolution.cpp includes this
// file once per instruction set, in a namespace that defines PYADV_TARGET (the attribute of its
// functions), kLanes, kRows, Lanes, splat(s) and fma(a, b, c) = a b + c. One function compiled for
// several sets would have to use the smallest vectors of them.

constexpr int kVectors = 2;  // vectors per row of products, held in registers
constexpr int kStrip = kVectors * kLanes;

PYADV_TARGET inline Lanes load(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PYADV_TARGET inline void store(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

// Loads the last `count` channels; the other lanes are 0.
PYADV_TARGET inline Lanes load(const float* from, int64_t count) {
  if (count == kLanes) return load(from);
  Lanes v = splat(0.0f);
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(float));
  return v;
}

PYADV_TARGET inline void store(float* to, Lanes v, int64_t count) {
  if (count == kLanes) return store(to, v);
  std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(float));
}

// Each form converts one line of pixels to points (`input`, B^T d) and one line of points to pixels
// (`output`, A^T m). `from` and `to` are the distances between neighbours of a line. `slot` is the
// index of a point's U.

// Evaluates the polynomial with these even and odd parts at +p and -p.
PYADV_TARGET inline void at_both(float p, Lanes even, Lanes odd, Lanes* plus, Lanes* minus) {
  *plus = fma(splat(p), odd, even);
  *minus = fma(splat(-p), odd, even);
}

// Computes four values of A^T m from the points +-near, +-far and infinity.
PYADV_TARGET inline void four_outputs(const Lanes* m, int from, Lanes last, Lanes* y, int to) {
  const Lanes n0 = m[0], n1 = m[from], f0 = m[2 * from], f1 = m[3 * from];
  const Lanes near_even = n0 + n1, near_odd = n0 - n1, far_even = f0 + f1, far_odd = f0 - f1;
  y[0] = near_even + far_even;
  y[to] = fma(splat(kNear), near_odd, splat(kFar) * far_odd);
  y[2 * to] = fma(splat(kNear2), near_even, splat(kFar2) * far_even);
  y[3 * to] = fma(splat(kNear * kNear2), near_odd, fma(splat(kFar * kFar2), far_odd, last));
}

struct Stride1 {
  static constexpr int kPatch = 6, kSide = 6, kStep = 4, kTile = 4;
  static constexpr int slot(int point) { return point; }

  // The points are 0, +-near, +-far, infinity.
  PYADV_TARGET static void input(const Lanes* d, int from, Lanes* t, int to) {
    const Lanes d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from];
    t[0] = fma(splat(kProduct2), d[0], fma(splat(-kSum2), d2, d4));
    at_both(kNear, fma(splat(-kFar2), d2, d4), fma(splat(-kFar2), d1, d3), t + to, t + 2 * to);
    at_both(kFar, fma(splat(-kNear2), d2, d4), fma(splat(-kNear2), d1, d3), t + 3 * to, t + 4 * to);
    t[5 * to] = fma(splat(kProduct2), d1, fma(splat(-kSum2), d3, d[5 * from]));
  }

  PYADV_TARGET static void output(const Lanes* m, int from, Lanes* y, int to) {
    four_outputs(m + from, from, m[5 * from], y, to);
    y[0] = y[0] + m[0];
  }
};

// Converts five pixels to the points +-near, +-far, infinity, for two taps.
PYADV_TARGET inline void two_taps(Lanes d0, Lanes d1, Lanes d2, Lanes d3, Lanes d4, Lanes* t,
                                  int to) {
  at_both(kNear, fma(splat(-kFar2), d1, d3), fma(splat(-kFar2), d0, d2), t, t + to);
  at_both(kFar, fma(splat(-kNear2), d1, d3), fma(splat(-kNear2), d0, d2), t + 2 * to, t + 3 * to);
  t[4 * to] = fma(splat(kProduct2), d0, fma(splat(-kSum2), d2, d4));
}

struct Stride2 {
  static constexpr int kPatch = 9, kSide = 9, kStep = 8, kTile = 4;
  static constexpr int slot(int point) { return point < 5 ? point : 5; }

  PYADV_TARGET static void input(const Lanes* d, int from, Lanes* t, int to) {
    two_taps(d[0], d[2 * from], d[4 * from], d[6 * from], d[8 * from], t, to);
    for (int i = 0; i < 4; ++i) t[(5 + i) * to] = d[(2 * i + 1) * from];
  }

  PYADV_TARGET static void output(const Lanes* m, int from, Lanes* y, int to) {
    four_outputs(m, from, m[4 * from], y, to);
    for (int i = 0; i < 4; ++i) y[i * to] = y[i * to] + m[(5 + i) * from];
  }
};

struct Transposed2 {
  static constexpr int kPatch = 5, kSide = 9, kStep = 4, kTile = 8;
  static constexpr int slot(int point) { return Stride2::slot(point); }

  PYADV_TARGET static void input(const Lanes* d, int from, Lanes* t, int to) {
    two_taps(d[0], d[from], d[2 * from], d[3 * from], d[4 * from], t, to);
    for (int i = 0; i < 4; ++i) t[(5 + i) * to] = d[i * from];
  }

  PYADV_TARGET static void output(const Lanes* m, int from, Lanes* y, int to) {
    four_outputs(m, from, m[4 * from], y + to, 2 * to);
    for (int i = 0; i < 4; ++i) y[2 * i * to] = m[(5 + i) * from];
  }
};

// Computes v[point][channel] for one tile; points are `line` floats apart.
template <class Form>
PYADV_TARGET inline void gather(const WinogradArgs& a, const Place& tile, const float* zeros,
                                float* v, int64_t line) {
  constexpr int P = Form::kPatch, S = Form::kSide;
  const int64_t top = tile.row * Form::kStep - a.padding,
                left = tile.column * Form::kStep - a.padding;
  const float* image = a.x + tile.image * (a.height * a.width * a.inputs);
  const float* pixel[P * P];
  for (int i = 0; i < P; ++i) {
    for (int j = 0; j < P; ++j) {
      const int64_t row = top + i, column = left + j;
      const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      pixel[i * P + j] = inside ? image + (row * a.width + column) * a.inputs : zeros;
    }
  }
  for (int64_t c = 0; c < a.inputs; c += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, a.inputs - c);
    Lanes t[S * P];
    for (int j = 0; j < P; ++j) {
      Lanes column[P];
      for (int i = 0; i < P; ++i) column[i] = load(pixel[i * P + j] + c, count);
      Form::input(column, 1, t + j, P);
    }
    for (int i = 0; i < S; ++i) {
      Lanes row[S];
      Form::input(t + i * P, 1, row, 1);
      for (int j = 0; j < S; ++j) store(v + (i * S + j) * line + c, row[j]);
    }
  }
}

// m[row][strip] = sum over channels of v[row][channel] u[channel][strip]. The sum runs in the order
// of the channels for any number of rows, so a tile's result does not depend on the other tiles.
template <int R>
PYADV_TARGET inline void multiply(const float* v, int64_t v_step, const float* u, int64_t channels,
                                  float* m, int64_t m_step) {
  Lanes sum[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kVectors; ++s) sum[r][s] = splat(0.0f);
  for (int64_t c = 0; c < channels; ++c, u += kPanel) {
    Lanes w[kVectors];
    for (int s = 0; s < kVectors; ++s) w[s] = load(u + s * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes value = splat(v[r * v_step + c]);
      for (int s = 0; s < kVectors; ++s) sum[r][s] = fma(value, w[s], sum[r][s]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < kVectors; ++s) store(m + r * m_step + s * kLanes, sum[r][s]);
}

PYADV_TARGET inline void multiply_rows(const float* v, int64_t v_step, int64_t rows, const float* u,
                                       int64_t channels, float* m, int64_t m_step) {
  for (int strip = 0; strip < kPanel; strip += kStrip) {
    int64_t r = 0;
    const auto rest = [&](int64_t count) { return rows - r >= count; };
    for (; rest(kRows); r += kRows)
      multiply<kRows>(v + r * v_step, v_step, u + strip, channels, m + r * m_step + strip, m_step);
    for (; rest(4); r += 4)
      multiply<4>(v + r * v_step, v_step, u + strip, channels, m + r * m_step + strip, m_step);
    for (; rest(2); r += 2)
      multiply<2>(v + r * v_step, v_step, u + strip, channels, m + r * m_step + strip, m_step);
    for (; rest(1); ++r)
      multiply<1>(v + r * v_step, v_step, u + strip, channels, m + r * m_step + strip, m_step);
  }
}

// Writes the output pixels of one tile for the channels of one panel.
template <class Form>
PYADV_TARGET inline void scatter(const WinogradArgs& a, const Place& tile, int64_t panel,
                                 const float* m) {
  constexpr int T = Form::kTile, S = Form::kSide;
  const int64_t top = tile.row * T, left = tile.column * T, first = panel * kPanel;
  const int64_t rows = std::min<int64_t>(T, a.out_height - top),
                columns = std::min<int64_t>(T, a.out_width - left),
                channels = std::min<int64_t>(kPanel, a.outputs - first);
  const int64_t image = tile.image * (a.out_height * a.out_width * a.outputs) + first;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channels - c);
    const Lanes bias = a.bias == nullptr ? splat(0.0f) : load(a.bias + first + c, count);
    Lanes t[T * S];
    for (int j = 0; j < S; ++j) {
      Lanes column[S];
      for (int i = 0; i < S; ++i) column[i] = load(m + (i * S + j) * kPanel + c);
      Form::output(column, 1, t + j, S);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Lanes row[T];
      Form::output(t + i * S, 1, row, 1);
      int64_t at = image + ((top + i) * a.out_width + left) * a.outputs + c;
      for (int64_t j = 0; j < columns; ++j, at += a.outputs) {
        Lanes y = row[j] + bias;
        if (a.added != nullptr) y = y + load(a.added + at, count);
        if (a.relu) y = y < splat(0.0f) ? splat(0.0f) : y;  // keeps NaN, as PyTorch does
        if (a.mask != nullptr) y = load(a.mask + at, count) <= splat(0.0f) ? splat(0.0f) : y;
        store(a.out + at, y, count);
      }
    }
  }
}

// Prefetches some channels of pixel k of each tile of side x side pixels. Calls spread over the
// multiplications hide much of the memory latency.
PYADV_TARGET inline void prefetch(const float* images, const Place* tiles, int64_t count, int side,
                                  int k, int64_t height, int64_t width, int64_t pixel,
                                  int64_t channels) {
  if (k >= side * side) return;
  const int i = k / side, j = k % side;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = tiles[t].row * side + i, column = tiles[t].column * side + j;
    if (row >= height || column >= width) continue;
    const float* from = images + ((tiles[t].image * height + row) * width + column) * pixel;
    for (int64_t c = 0; c < channels; c += kLineFloats) __builtin_prefetch(from + c, 0, 2);
  }
}

// Computes the tiles [begin, end) in blocks that fit the cache.
template <class Form>
PYADV_TARGET inline void convolve(const WinogradArgs& a, int64_t begin, int64_t end) {
  constexpr int S = Form::kSide;
  const int64_t block = block_of(a.inputs, a.outputs), line = whole_lines(a.inputs);
  // One extra cache line between tiles keeps them from falling into the same few cache sets.
  const int64_t v_step = S * S * line + kLineFloats, m_step = S * S * kPanel + kLineFloats;
  const int64_t slot_size = a.inputs * kPanel, panels = panels_of(a.outputs);
  float* const zeros = room_of(line + block * (v_step + m_step));
  float* const v = zeros + line;
  float* const m = v + block * v_step;
  std::fill(zeros, zeros + line, 0.0f);
  Place now[kMostTiles], next[kMostTiles];
  places_of(a, begin, std::min(begin + block, end), next);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t tiles = std::min(block, end - first);
    std::copy(next, next + tiles, now);
    const int64_t coming = places_of(a, first + tiles, std::min(first + tiles + block, end), next);
    for (int64_t t = 0; t < tiles; ++t) gather<Form>(a, now[t], zeros, v + t * v_step, line);
    for (int64_t p = 0; p < panels; ++p) {
      const float* u = a.weight + p * kSlots * slot_size;
      const int64_t channels = std::min<int64_t>(kPanel, a.outputs - p * kPanel);
      for (int k = 0; k < S * S; ++k) {
        for (const float* written : {static_cast<const float*>(a.out), a.added, a.mask})
          if (written != nullptr)
            prefetch(written + p * kPanel, now, tiles, Form::kTile, k, a.out_height, a.out_width,
                     a.outputs, channels);
        if (p + 1 == panels)
          prefetch(a.x, next, coming, Form::kStep, k, a.height, a.width, a.inputs, a.inputs);
        const int slot = Form::slot(k / S) * 6 + Form::slot(k % S);
        multiply_rows(v + k * line, v_step, tiles, u + slot * slot_size, a.inputs, m + k * kPanel,
                      m_step);
      }
      for (int64_t t = 0; t < tiles; ++t) scatter<Form>(a, now[t], p, m + t * m_step);
    }
  }
}

PYADV_TARGET void convolve(const WinogradArgs& a, int64_t begin, int64_t end) {
  switch (a.form) {
    case WinogradForm::Stride1:
      return convolve<Stride1>(a, begin, end);
    case WinogradForm::Stride2:
      return convolve<Stride2>(a, begin, end);
    case WinogradForm::Transposed2:
      return convolve<Transposed2>(a, begin, end);
  }
}
