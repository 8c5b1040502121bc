// A GPU's block on one CPU core, for the text that TVM prints of a kernel: every thread is a fiber that runs until it
// must wait for others (barrier, warp instruction, arrival of a copy). What is asynchronous on the device happens as
// late as the kernel allows, shared memory starts as NaNs, and the order of threads is random: a missing wait or
// barrier gives wrong results here too. Reading or writing outside an array is an error with the thread's place.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <functional>
#include <map>
#include <utility>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define BITWRIGHT_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

namespace bw {
constexpr int kWarp = 32, kShared = 227 * 1024, kStack = 64 * 1024, kCluster = 8;
struct Dim { int x = 0, y = 0, z = 0; };
alignas(1024) static unsigned char shared_memory[kCluster][kShared];
struct Block;

// ---- fibers
enum State { kReady, kDone };
struct Fiber {
  void* sp = nullptr;
  unsigned char* stack = nullptr;
  Dim id;
  State state = kDone;
  Block* block = nullptr;
  std::function<bool()> waits_for;  // empty: ready
  const char* where = "";           // what it waits in
  std::vector<std::vector<std::function<void()>>> copies;  // committed groups of cp.async, oldest first
  std::vector<std::function<void()>> pending;              // cp.async not yet committed
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};
static std::vector<Fiber> fibers;
static Fiber* self = nullptr;
static Fiber scheduler;
static Dim block_index, block_size, grid_size;
static void (*entry)(void**) = nullptr;
static void** arguments = nullptr;
static char message[512];
static sigjmp_buf escape;
static uint64_t seed = 1;
static inline uint64_t random_word() {
  seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
  return seed;
}

#if defined(__x86_64__)
extern "C" void bw_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
bw_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static inline void change(Fiber& from, Fiber& to) { bw_switch(&from.sp, to.sp); }
#else
static inline void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

static void leave() { change(*self, scheduler); }
static void body() {
  entry(arguments);
  for (auto& g : self->copies) for (auto& c : g) c();
  self->copies.clear();
  self->state = kDone;
  leave();
  abort();
}
static void start(Fiber& f) {
  f.state = kReady;
  f.waits_for = nullptr;
  f.copies.clear();
  f.pending.clear();
  if (!f.stack)
    f.stack = (unsigned char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
#if defined(__x86_64__)
  void** top = (void**)(f.stack + kStack) - 2;
  *top = (void*)body;                 // return address: at entry the stack is 16-byte aligned plus 8
  f.sp = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  makecontext(&f.context, body, 0);
#endif
}
[[noreturn]] static void fail(const char* text) {
  snprintf(message, sizeof message, "block (%d, %d, %d), thread %d: %s", block_index.x, block_index.y, block_index.z,
           self ? self->id.x : -1, text);
  siglongjmp(escape, 1);
}
// Let others run until `condition` holds.
static void wait_until(std::function<bool()> condition, const char* where) {
  if (condition()) return;
  self->waits_for = std::move(condition);
  self->where = where;
  leave();
}

// ---- barriers and collectives
struct Barrier { int arrived = 0; long turn = 0; };
struct Collective {
  std::vector<unsigned char> in[2], out[2];
  int arrived = 0;
  long turn = 0;
  const char* name = "";
};
// Blocks of a cluster run at once, each with shared memory of its own; without clusters there is one.
struct Block {
  Dim index;
  int rank = 0, running = 0;
  unsigned char* shared = nullptr;
  Barrier barriers[16];
  std::map<std::pair<int, int>, Collective> collectives;
};
static Block blocks[kCluster];
static Block* here = nullptr;
static Barrier cluster_barrier;
static int cluster_size = 1;
static void arrive(Barrier& b, int count) {
  long turn = b.turn;
  if (++b.arrived == count) { b.arrived = 0; b.turn++; }
  wait_until([&b, turn] { return b.turn != turn; }, "a barrier");
}
static void barrier(int id, int count) { arrive(here->barriers[id], count); }
static void cluster_sync() { arrive(cluster_barrier, block_size.x * cluster_size); }
// All `lanes` threads around this one hand in `in`; the last one runs `compute(ins, outs)`; each gets its `out`.
static void collective(const char* name, int lanes, const void* in, size_t in_size, void* out, size_t out_size,
                       const std::function<void(const unsigned char*, unsigned char*)>& compute) {
  int group = self->id.x / lanes, lane = self->id.x % lanes;
  Collective& c = here->collectives[{lanes, group}];
  if (c.arrived && strcmp(c.name, name)) fail("threads of one warp meet different instructions");
  c.name = name;
  long turn = c.turn;
  auto &ins = c.in[turn & 1], &outs = c.out[turn & 1];
  ins.resize(lanes * in_size);
  outs.resize(lanes * out_size);
  memcpy(ins.data() + lane * in_size, in, in_size);
  if (++c.arrived == lanes) { compute(ins.data(), outs.data()); c.arrived = 0; c.turn++; }
  wait_until([&c, turn] { return c.turn != turn; }, name);
  memcpy(out, c.out[turn & 1].data() + lane * out_size, out_size);
}
template <class In, class Out, class F> static Out together(const char* name, int lanes, const In& in, F compute) {
  Out out;
  collective(name, lanes, &in, sizeof in, &out, sizeof out, [&compute](const unsigned char* i, unsigned char* o) {
    compute((const In*)i, (Out*)o);
  });
  return out;
}
static inline uint32_t shared_address(const void* p) {
  intptr_t at = (const unsigned char*)p - here->shared;
  if (at < 0 || at >= kShared) fail("an address outside shared memory where one inside is needed");
  return (uint32_t)at;
}

// ---- what later headers add: state of a block to forget, copies that nobody waits for by number, and where a thread
// wrote shared memory in a way that the asynchronous proxy sees after a fence
static std::vector<void (*)()> resets;
static std::vector<std::function<void()>> under_way;
static void (*on_staged)(void*, size_t) = nullptr;
static inline void staged(void* to, size_t size) { if (on_staged) on_staged(to, size); }
static bool arrive_one() {
  if (under_way.empty()) return false;
  std::swap(under_way.back(), under_way[random_word() % under_way.size()]);
  auto copy = std::move(under_way.back());
  under_way.pop_back();
  copy();
  return true;
}

// ---- running
static void change_to(Fiber& f) {
  self = &f;
  here = f.block;
  block_index = here->index;
  change(scheduler, f);
}
// The blocks of one cluster, the first of them at `first`.
static void run_blocks(Dim first, int threads) {
  int total = threads * cluster_size;
  under_way.clear();
  cluster_barrier = Barrier();
  for (int c = 0; c < cluster_size; c++) {
    blocks[c] = Block();
    blocks[c].index = {first.x + c, first.y, first.z};
    blocks[c].rank = c;
    blocks[c].running = threads;
    blocks[c].shared = shared_memory[c];
    memset(shared_memory[c], 0xff, kShared);
  }
  for (auto reset : resets) reset();
  std::vector<int> alive(total);
  for (int t = 0; t < total; t++) {
    alive[t] = t;
    fibers[t].id.x = t % threads;
    fibers[t].block = &blocks[t / threads];
    start(fibers[t]);
  }
  while (!alive.empty()) {
    bool ran = false;
    for (size_t i = alive.size(); i > 1; i--) std::swap(alive[i - 1], alive[random_word() % i]);
    for (size_t i = 0; i < alive.size();) {
      Fiber& f = fibers[alive[i]];
      if (f.waits_for && !f.waits_for()) { i++; continue; }
      f.waits_for = nullptr;
      ran = true;
      change_to(f);
      if (f.state == kDone) { f.block->running--; alive[i] = alive.back(); alive.pop_back(); } else i++;
    }
    if ((!ran || random_word() % 8 == 0) && arrive_one()) continue;
    if (!ran) {
      self = &fibers[alive[0]];
      block_index = self->block->index;
      char text[256];
      snprintf(text, sizeof text, "%zu of %d threads wait for ever, this one in %s", alive.size(), total, self->where);
      fail(text);
    }
  }
  self = nullptr;
  if (!under_way.empty()) fail("the block ends before a bulk copy has arrived");
}
static void on_fault(int, siginfo_t* info, void*) {
  snprintf(message, sizeof message, "block (%d, %d, %d), thread %d: access outside of an array (address %p)",
           block_index.x, block_index.y, block_index.z, self ? self->id.x : -1, info->si_addr);
  siglongjmp(escape, 2);
}
template <class... T, size_t... I> static void spread(void (*kernel)(T...), void** a, std::index_sequence<I...>) {
  kernel((T)a[I]...);
}
template <class... T> static void apply(void (*kernel)(T...), void** a) {
  spread(kernel, a, std::index_sequence_for<T...>());
}
// Run all blocks of a kernel; 0, or not and `message` says what was wrong.
static int launch(void (*call)(void**), void** args, const int* shape, uint64_t order, int cluster) {
  static bool guarded = false;
  struct sigaction was_segv, was_bus, act = {};
  static unsigned char* alternative = (unsigned char*)malloc(1 << 16);
  stack_t stack = {};
  stack.ss_sp = alternative;
  stack.ss_size = 1 << 16;
  if (!guarded) { sigaltstack(&stack, nullptr); guarded = true; }
  act.sa_sigaction = on_fault;
  act.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &act, &was_segv);
  sigaction(SIGBUS, &act, &was_bus);
  entry = call;
  arguments = args;
  seed = order * 0x9e3779b97f4a7c15ull + 1;
  grid_size = {shape[0], shape[1], shape[2]};
  block_size = {shape[3], 1, 1};
  cluster_size = cluster;
  if ((int)fibers.size() < shape[3] * cluster) fibers.resize(shape[3] * cluster);
  message[0] = 0;
  int code = sigsetjmp(escape, 1);
  if (!code) {
    for (int z = 0; z < shape[2]; z++)
      for (int y = 0; y < shape[1]; y++)
        for (int x = 0; x < shape[0]; x += cluster) {
          block_index = {x, y, z};
          if (cluster > kCluster || shape[0] % cluster) fail("a grid that is no multiple of its clusters, or too large ones");
          run_blocks({x, y, z}, shape[3]);
        }
  }
  sigaction(SIGSEGV, &was_segv, nullptr);
  sigaction(SIGBUS, &was_bus, nullptr);
  self = nullptr;
  return code;
}
}  // namespace bw

#define threadIdx (bw::self->id)
#define blockIdx (bw::block_index)
#define blockDim (bw::block_size)
#define gridDim (bw::grid_size)
static inline void __syncthreads() { bw::barrier(0, bw::block_size.x); }
extern "C" const char* bw_message() { return bw::message; }
