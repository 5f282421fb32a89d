#include "common/noise.h"

#include <algorithm>

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace pyadv {
namespace cpu {
namespace {

template <template <class> class Draw>
struct NoiseLoop {
  template <class T>
  PYADV_HD static void run(T* out, const Philox* philox, uint32_t first, int64_t blocks) {
    const Philox words = *philox;
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < blocks; ++i)
      Draw<T>()(words(first + static_cast<uint32_t>(i)), out + kBlockWords * i);
  }
};

template <template <class> class Draw>
void noise(const NoiseArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = noise_blocks(args.n), whole = args.n / kBlockWords;
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_spans(begin, end, blocks, [&](int64_t i, int64_t last) {
      const int64_t row = i / blocks, first = i - row * blocks, stop = last - row * blocks;
      const Philox philox(args, row);
      T* out = static_cast<T*>(args.out) + row * args.n;
      run<NoiseLoop<Draw>>(out + first * kBlockWords, &philox, static_cast<uint32_t>(first),
                           std::min(stop, whole) - first);
      if (stop > whole) {  // the row ends inside a block
        T tail[kBlockWords];
        run<NoiseLoop<Draw>>(tail, &philox, static_cast<uint32_t>(whole), int64_t{1});
        std::copy(tail, tail + args.n % kBlockWords, out + whole * kBlockWords);
      }
    });
  });
}

struct HashLoop {
  template <class T>
  PYADV_HD static void run(const T* x, int64_t n, uint64_t* sum) {
    uint64_t total = 0;  // an integer sum has the same bits in any order
    for (int64_t i = 0; i < n; ++i) total += hash_term(x[i], hash_offset(static_cast<uint64_t>(i)));
    *sum = total;
  }
};

}  // namespace

void keyed_uniform(const NoiseArgs& args, int64_t begin, int64_t end) {
  noise<Uniform>(args, begin, end);
}

void keyed_normal(const NoiseArgs& args, int64_t begin, int64_t end) {
  noise<Normal>(args, begin, end);
}

void row_hash(const HashArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t row = begin; row < end; ++row) {
      uint64_t sum;
      run<HashLoop>(static_cast<const T*>(args.x) + row * args.n, args.n, &sum);
      args.out[row] = static_cast<int64_t>(mix(sum));
    }
  });
}

}  // namespace cpu
}  // namespace pyadv
