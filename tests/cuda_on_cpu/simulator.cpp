// Runs the threads of one block as fibers; see cuda_on_cpu.h. Compiled without sanitizers.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Begin and end of all __shared__ variables (shared_memory.ld); null in a program without any.
extern "C" __attribute__((weak, visibility("hidden"))) uint64_t cuda_shared_begin[],
    cuda_shared_end[];

// AddressSanitizer's functions, null without it. They tell it which stack is in use.
extern "C" __attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" __attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);

namespace cuda_on_cpu {
namespace {

// Fibers. On x86-64 a switch is a few instructions of our own; swapcontext, used elsewhere, makes
// two system calls each time.

#if defined(__x86_64__)
struct Context {
  void* sp = nullptr;
};
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .text
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
void start(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  c.sp = top - 6;  // the registers that the first switch pops
}
void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from.sp, to.sp); }
#else
}  // namespace
}  // namespace cuda_on_cpu
#include <ucontext.h>
namespace cuda_on_cpu {
namespace {
using Context = ucontext_t;
void start(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

constexpr size_t kStack = 256 << 10, kGuard = 4096;

struct Fiber {
  Context context;
  char* memory;
  void* fake_stack = nullptr;

  explicit Fiber(void (*entry)()) {
    void* p = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(p);
    mprotect(memory, kGuard, PROT_NONE);
    start(context, memory + kGuard, kStack, entry);
  }
  ~Fiber() {  // its thread may have stopped in the middle of a kernel
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, kGuard + kStack);
    munmap(memory, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
};

bool operator!=(Site a, Site b) {
  return a.line != b.line || (a.file != b.file && strcmp(a.file, b.file) != 0);
}

std::string to_string(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

enum class State : uint8_t { Ready, AtBarrier, AtClusterBarrier, AtShuffle, AtBallot, Returned };

struct Copy {
  void* to;
  char bytes[16];
};

struct Thread {
  Fiber* fiber = nullptr;  // assigned from the thread's first turn to its last
  State state = State::Ready;
  Site site{};
  unsigned mask = 0, source = 0;
  uint64_t bits = 0, result = 0;
  std::vector<Copy> copies;  // started, not finished
  bool waits_in_warp() const { return state == State::AtShuffle || state == State::AtBallot; }
};

constexpr unsigned kWarp = 32;

struct Free {
  void operator()(void* p) const { free(p); }
};

// One block of a launch.
struct Block {
  uint3 index{};
  std::vector<Thread> threads_;
  std::vector<std::vector<unsigned>> ready_;  // by warp
  std::vector<unsigned> warp_order_;
  bool keep_order_ = false;
  unsigned at_barrier_ = 0, at_cluster_barrier_ = 0, returned_ = 0;
  int votes_ = 0, counted_ = 0;
  std::unique_ptr<void, Free> dynamic_;  // dynamic shared memory
  std::vector<uint64_t> statics_;        // __shared__ variables while another block runs

  bool is_ready() const {
    for (const std::vector<unsigned>& lanes : ready_)
      if (!lanes.empty()) return true;
    return false;
  }
};

// The running block is the base class; the other blocks of its cluster wait in `cluster_`.
class Simulator : private Block {
 public:
  void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared,
              const std::function<void()>& thread, unsigned cluster);
  cudaError_t take_error() { return std::exchange(error_, cudaSuccess); }
  cudaError_t set_shared_limit(const void* kernel, int bytes);
  void seed(unsigned value) { random_.seed(value); }

  void* dynamic_shared() { return dynamic_.get(); }
  unsigned rank() const { return rank_; }
  void wait_for_cluster(Site site);
  const void* cluster_address(const void* p, unsigned rank, Site site);
  void start_copy(void* to, const void* bytes);
  void finish_copies();
  unsigned current() const { return current_; }
  void wait_for_block(Site site);
  int count_in_block(bool vote, Site site);
  uint64_t wait_for_warp(State state, unsigned mask, uint64_t bits, unsigned source, Site site);

 private:
  static void run_threads();
  bool refuses(Kernel kernel, dim3 grid, dim3 block, size_t shared, unsigned cluster);
  void run_cluster(const std::vector<uint3>& blocks);
  void start_block(uint3 index);
  void exchange(unsigned rank);
  bool pick_block();
  bool complete_cluster_barrier();
  void fill_shared();
  bool pick();
  void resume(Thread& t);
  void leave();
  void set_ready(unsigned thread);
  void complete_warp(unsigned warp, unsigned mask);
  void complete_barrier();
  [[noreturn]] void fail(const std::string& what);
  std::string describe_stall() const;

  std::mt19937 random_{0};
  std::map<const void*, int> shared_limits_;
  cudaError_t error_ = cudaSuccess;

  // of the launch
  Kernel kernel_{};
  const std::function<void()>* body_ = nullptr;
  size_t dynamic_bytes_ = 0;

  std::vector<Block> cluster_;  // the entry of the running block is empty
  unsigned rank_ = 0;           // of the running block
  unsigned current_ = 0;        // thread of the running block
  std::string failure_;

  // fibers
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Context scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

Simulator& simulator() {
  static Simulator s;
  return s;
}

bool Simulator::refuses(Kernel kernel, dim3 grid, dim3 block, size_t shared, unsigned cluster) {
  const bool sizes = grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 65535 &&
                     grid.z >= 1 && grid.z <= 65535 && block.x >= 1 && block.x <= 1024 &&
                     block.y >= 1 && block.y <= 1024 && block.z >= 1 && block.z <= 64 &&
                     static_cast<uint64_t>(block.x) * block.y * block.z <= 1024 && cluster >= 1 &&
                     cluster <= 8 && grid.x % cluster == 0;
  const auto limit = shared_limits_.find(kernel.address);
  const size_t most = limit == shared_limits_.end() ? 48 << 10 : limit->second;
  if (!sizes)
    error_ = cudaErrorInvalidConfiguration;
  else if (shared > most)
    error_ = cudaErrorInvalidValue;
  return !sizes || shared > most;
}

cudaError_t Simulator::set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > (227 << 10)) return error_ = cudaErrorInvalidValue;
  shared_limits_[kernel] = bytes;
  return cudaSuccess;
}

void Simulator::launch(Kernel kernel, dim3 grid, dim3 block, size_t shared,
                       const std::function<void()>& thread, unsigned cluster) {
  if (refuses(kernel, grid, block, shared, cluster)) return;
  kernel_ = kernel;
  body_ = &thread;
  gridDim = grid;
  blockDim = block;
  dynamic_bytes_ = shared;
  std::vector<uint64_t> clusters(static_cast<uint64_t>(grid.x / cluster) * grid.y * grid.z);
  for (uint64_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  // A random order, since no block may depend on an earlier one.
  std::shuffle(clusters.begin(), clusters.end(), random_);
  const unsigned across = grid.x / cluster;
  for (const uint64_t i : clusters) {
    std::vector<uint3> blocks(cluster);
    for (unsigned rank = 0; rank < cluster; ++rank)
      blocks[rank] = {static_cast<unsigned>(i % across) * cluster + rank,
                      static_cast<unsigned>(i / across % grid.y),
                      static_cast<unsigned>(i / across / grid.y)};
    run_cluster(blocks);
    if (!failure_.empty()) {
      idle_.clear();
      fibers_.clear();  // some wait in the middle of the kernel
      throw std::runtime_error(std::exchange(failure_, {}));
    }
  }
}

void Simulator::fill_shared() {
  for (volatile uint64_t* p = cuda_shared_begin; p < cuda_shared_end; ++p) *p = ~0ull;
  if (dynamic_bytes_ != 0) memset(dynamic_.get(), 0xFF, dynamic_bytes_);
}

// Makes the block ready to run, as the running block.
void Simulator::start_block(uint3 index) {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z, warps = (n + kWarp - 1) / kWarp;
  static_cast<Block&>(*this) = Block{};
  this->index = index;
  threads_.assign(n, Thread{});
  ready_.assign(warps, {});
  warp_order_.resize(warps);
  for (unsigned w = 0; w < warps; ++w) warp_order_[w] = w;
  for (unsigned t = 0; t < n; ++t) ready_[t / kWarp].push_back(t);
  std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
  keep_order_ = random_() & 1;  // half the blocks let some warps run as far ahead as they can
  // Exactly the size asked for, so that AddressSanitizer sees the end.
  void* memory = nullptr;
  if (dynamic_bytes_ != 0 && posix_memalign(&memory, 16, dynamic_bytes_) != 0)
    throw std::bad_alloc();
  dynamic_.reset(memory);
  fill_shared();
}

// Exchanges the running block, with its __shared__ variables, for block `rank` of the cluster.
void Simulator::exchange(unsigned rank) {
  if (rank == rank_) return;
  const size_t words = static_cast<size_t>(cuda_shared_end - cuda_shared_begin);
  volatile uint64_t* const live = cuda_shared_begin;
  statics_.resize(words);
  for (size_t i = 0; i < words; ++i) statics_[i] = live[i];
  std::swap(static_cast<Block&>(*this), cluster_[rank_]);
  std::swap(static_cast<Block&>(*this), cluster_[rank]);
  rank_ = rank;
  if (statics_.size() == words)  // it has run before
    for (size_t i = 0; i < words; ++i) live[i] = statics_[i];
}

void Simulator::run_cluster(const std::vector<uint3>& blocks) {
  cluster_.clear();
  cluster_.resize(blocks.size());
  rank_ = 0;
  start_block(blocks[0]);
  for (unsigned rank = 1; rank < blocks.size(); ++rank) {
    exchange(rank);
    start_block(blocks[rank]);
  }
  while (failure_.empty() && pick_block()) {
    blockIdx = index;
    while (failure_.empty() && pick()) resume(threads_[current_]);
  }
  for (unsigned rank = 0; failure_.empty() && rank < blocks.size(); ++rank) {
    exchange(rank);
    if (returned_ < threads_.size()) failure_ = kernel_.name + (": " + describe_stall());
  }
}

// Makes a random block that can continue the running one. Returns false if there is none.
bool Simulator::pick_block() {
  const unsigned n = static_cast<unsigned>(cluster_.size()), first = n == 1 ? 0 : random_() % n;
  do {
    for (unsigned k = 0; k < n; ++k) {
      const unsigned rank = (first + k) % n;
      if (rank == rank_ ? !is_ready() : !cluster_[rank].is_ready()) continue;
      exchange(rank);
      return true;
    }
  } while (complete_cluster_barrier());
  return false;
}

// Lets all threads of the cluster pass its barrier if all of them wait there.
bool Simulator::complete_cluster_barrier() {
  const auto state = [this](unsigned rank) -> Block& {
    return rank == rank_ ? static_cast<Block&>(*this) : cluster_[rank];
  };
  const Site first = state(0).threads_[0].site;
  for (unsigned rank = 0; rank < cluster_.size(); ++rank) {
    const Block& block = state(rank);
    if (block.at_cluster_barrier_ != block.threads_.size()) return false;
    for (const Thread& t : block.threads_) {
      if (t.site != first) {
        failure_ =
            std::string(kernel_.name) + ": threads of one cluster meet at different barriers";
        return false;
      }
    }
  }
  for (unsigned rank = 0; rank < cluster_.size(); ++rank) {
    Block& block = state(rank);
    block.at_cluster_barrier_ = 0;
    for (unsigned i = 0; i < block.threads_.size(); ++i) {
      block.threads_[i].state = State::Ready;
      block.ready_[i / kWarp].push_back(i);
    }
  }
  return true;
}

void Simulator::wait_for_cluster(Site site) {
  Thread& t = threads_[current_];
  t.state = State::AtClusterBarrier;
  t.site = site;
  ++at_cluster_barrier_;
  leave();
}

const void* Simulator::cluster_address(const void* p, unsigned rank, Site site) {
  const auto at = [](const void* q) { return reinterpret_cast<uintptr_t>(q); };
  if (rank >= cluster_.size()) fail(to_string(site) + ": the cluster has no such block");
  if (rank == rank_) return p;
  const Block& block = cluster_[rank];
  if (block.returned_ == block.threads_.size())
    fail(to_string(site) + ": reads the shared memory of a block that has returned");
  if (at(p) >= at(cuda_shared_begin) && at(p) < at(cuda_shared_end))
    return reinterpret_cast<const char*>(block.statics_.data()) + (at(p) - at(cuda_shared_begin));
  if (at(p) < at(dynamic_.get()) || at(p) >= at(dynamic_.get()) + dynamic_bytes_)
    fail(to_string(site) + ": not an address in shared memory");
  return static_cast<const char*>(block.dynamic_.get()) + (at(p) - at(dynamic_.get()));
}

void Simulator::start_copy(void* to, const void* bytes) {
  Copy copy{to, {}};
  memcpy(copy.bytes, bytes, sizeof(copy.bytes));
  threads_[current_].copies.push_back(copy);
}

void Simulator::finish_copies() {
  for (const Copy& copy : threads_[current_].copies)
    memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
  threads_[current_].copies.clear();
}

// Draws the next thread: its warp by a fixed or a turning order, the lane at random.
bool Simulator::pick() {
  if (!keep_order_) std::swap(warp_order_[0], warp_order_[random_() % warp_order_.size()]);
  for (const unsigned w : warp_order_) {
    std::vector<unsigned>& lanes = ready_[w];
    if (lanes.empty()) continue;
    std::swap(lanes[random_() % lanes.size()], lanes.back());
    current_ = lanes.back();
    lanes.pop_back();
    return true;
  }
  return false;
}

void Simulator::resume(Thread& t) {
  if (t.fiber == nullptr) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Simulator::run_threads));
      idle_.push_back(fibers_.back().get());
    }
    t.fiber = idle_.back();
    idle_.pop_back();
  }
  threadIdx = {current_ % blockDim.x, current_ / blockDim.x % blockDim.y,
               current_ / blockDim.x / blockDim.y};
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, t.fiber->memory + kGuard, kStack);
  switch_context(scheduler_, t.fiber->context);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
}

// Switches to the scheduler until it resumes this thread.
void Simulator::leave() {
  Fiber* fiber = threads_[current_].fiber;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  switch_context(fiber->context, scheduler_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
}

// Body of a fiber: runs one thread after another.
void Simulator::run_threads() {
  Simulator& s = simulator();
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack_, &s.scheduler_stack_bytes_);
  for (;;) {
    (*s.body_)();
    Thread& t = s.threads_[s.current_];
    t.state = State::Returned;
    ++s.returned_;
    s.idle_.push_back(t.fiber);
    s.leave();
  }
}

void Simulator::set_ready(unsigned thread) {
  threads_[thread].state = State::Ready;
  ready_[thread / kWarp].push_back(thread);
}

void Simulator::fail(const std::string& what) {
  failure_ = std::string(kernel_.name) + ": " + what;
  leave();
  abort();  // a failed launch is never resumed
}

void Simulator::wait_for_block(Site site) {
  Thread& t = threads_[current_];
  t.state = State::AtBarrier;
  t.site = site;
  if (++at_barrier_ == threads_.size()) complete_barrier();
  leave();
}

void Simulator::complete_barrier() {
  const Site first = threads_[0].site;
  for (unsigned i = 0; i < threads_.size(); ++i) {
    if (threads_[i].site != first)
      fail("threads of one block meet at different barriers, " + to_string(first) + " and " +
           to_string(threads_[i].site));
    set_ready(i);
  }
  at_barrier_ = 0;
  counted_ = std::exchange(votes_, 0);
}

int Simulator::count_in_block(bool vote, Site site) {
  votes_ += vote;
  wait_for_block(site);
  // Nobody passes the next barrier, which would count anew, before this thread has read.
  return counted_;
}

uint64_t Simulator::wait_for_warp(State state, unsigned mask, uint64_t bits, unsigned source,
                                  Site site) {
  const unsigned lane = current_ % kWarp, warp = current_ / kWarp;
  const unsigned lanes = std::min<unsigned>(kWarp, threads_.size() - warp * kWarp);
  if (!(mask >> lane & 1)) fail(to_string(site) + ": the calling lane is not in the mask");
  if (lanes < kWarp && mask >> lanes != 0)
    fail(to_string(site) + ": the mask names lanes that the block does not have");
  if (source >= kWarp || !(mask >> source & 1))
    fail(to_string(site) + ": shuffle from lane " + std::to_string(source) + ", not in the mask");
  Thread& t = threads_[current_];
  t.state = state;
  t.site = site;
  t.mask = mask;
  t.source = source;
  t.bits = bits;
  complete_warp(warp, mask);
  leave();
  return t.result;
}

// Gives every lane of the mask its result once all of them wait.
void Simulator::complete_warp(unsigned warp, unsigned mask) {
  Thread* lanes = &threads_[warp * kWarp];
  const Thread& t = threads_[current_];
  unsigned votes = 0;
  for (unsigned k = 0; k < kWarp; ++k) {
    if (!(mask >> k & 1)) continue;
    const Thread& other = lanes[k];
    if (other.state != t.state || other.mask != mask || other.site != t.site) return;
    votes |= (other.bits & 1) << k;
  }
  const State state = t.state;
  for (unsigned k = 0; k < kWarp; ++k) {
    if (!(mask >> k & 1)) continue;
    lanes[k].result = state == State::AtBallot ? votes : lanes[lanes[k].source].bits;
    set_ready(warp * kWarp + k);
  }
}

// Returns the reason why the remaining threads cannot continue.
std::string Simulator::describe_stall() const {
  const auto at = [](State s) { return s == State::AtBarrier ? "barrier" : "warp collective"; };
  for (unsigned i = 0; i < threads_.size(); ++i) {
    const Thread& t = threads_[i];
    if (!t.waits_in_warp()) continue;
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(t.mask >> k & 1)) continue;
      const Thread& other = threads_[i / kWarp * kWarp + k];
      const std::string waits = "deadlock: lane " + std::to_string(i % kWarp) + " waits at " +
                                to_string(t.site) + " for lane " + std::to_string(k);
      if (other.state == State::Returned) return waits + ", which has returned";
      if (other.state != t.state || other.mask != t.mask || other.site != t.site)
        return waits + ", which waits at another " + at(other.state) + ", " + to_string(other.site);
    }
  }
  for (const Thread& t : threads_)
    if (t.state == State::AtClusterBarrier)
      return "deadlock: a thread waits at the cluster's barrier at " + to_string(t.site) +
             ", which not all threads of the cluster reach";
  for (const Thread& t : threads_)
    if (t.state == State::AtBarrier)
      return "deadlock: " + std::to_string(at_barrier_) + " of " + std::to_string(threads_.size()) +
             " threads wait at the barrier at " + to_string(t.site) + ", the others have returned";
  return "deadlock";
}

}  // namespace

// One launch at a time, because the state of a block and its __shared__ variables are global.
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared,
            const std::function<void()>& thread, unsigned cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  simulator().launch(kernel, grid, block, shared, thread, cluster);
}

void* dynamic_shared() { return simulator().dynamic_shared(); }
void random_order(unsigned seed) { simulator().seed(seed); }
unsigned lane() { return simulator().current() % kWarp; }
unsigned cluster_rank() { return simulator().rank(); }
void cluster_barrier(Site site) { simulator().wait_for_cluster(site); }
const void* cluster_address(const void* p, unsigned rank, Site site) {
  return simulator().cluster_address(p, rank, site);
}
void start_copy(void* to, const void* bytes) { simulator().start_copy(to, bytes); }
void finish_copies() { simulator().finish_copies(); }
void block_barrier(Site site) { simulator().wait_for_block(site); }
int block_count(bool vote, Site site) { return simulator().count_in_block(vote, site); }
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source, Site site) {
  return simulator().wait_for_warp(State::AtShuffle, mask, bits, source, site);
}
unsigned ballot(unsigned mask, bool vote, Site site) {
  return static_cast<unsigned>(
      simulator().wait_for_warp(State::AtBallot, mask, vote, lane(), site));
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return cuda_on_cpu::simulator().take_error(); }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return cuda_on_cpu::simulator().set_shared_limit(kernel, value);
}
