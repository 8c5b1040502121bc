// Hopper's asynchronous units: mbarriers, bulk copies, the asynchronous proxy's view of shared memory, wgmma.
// What the asynchronous proxy (wgmma, bulk copies) reads is a second copy of shared memory: data get there by bulk
// copies, or by cp.async and bw_stage* followed by the writing thread's fence.proxy.async. A wgmma runs at a random
// moment between its issue and the wait that asks for it; until then its accumulators hold poison.
#pragma once
#include "emulator.h"
#include "types.h"

namespace bw {
constexpr int kGroup = 128;

// ---- the asynchronous proxy
alignas(1024) static unsigned char async_memory[kCluster][kShared];
static bool async_used = false;
struct Range { uint32_t at, size; };
static unsigned char* async_view() { return async_memory[here->rank]; }
static size_t fiber() { return self - fibers.data(); }
static std::vector<std::vector<Range>> unfenced;
static void note_staged(void* to, size_t size) {
  if (fiber() >= unfenced.size()) unfenced.resize(fiber() + 1);
  unfenced[fiber()].push_back({shared_address(to), (uint32_t)size});
}
static void fence_proxy() {
  async_used = true;
  if (fiber() >= unfenced.size()) return;
  for (auto r : unfenced[fiber()]) memcpy(async_view() + r.at, here->shared + r.at, r.size);
  unfenced[fiber()].clear();
}

// ---- mbarriers
struct MBarrier { int count, pending; long bytes; unsigned phase; };
static std::map<const unsigned char*, MBarrier> mbarriers;
static const unsigned char kMark[9] = "mbarrier";
static MBarrier& mbarrier(const void* p) {
  auto found = mbarriers.find((const unsigned char*)p);
  if (found == mbarriers.end()) fail("an mbarrier that was not initialised");
  if (memcmp(p, kMark, 8)) fail("an mbarrier was overwritten");
  return found->second;
}
static void mbarrier_init(void* p, int count) {
  if (shared_address(p) % 8) fail("an mbarrier at an unaligned address");
  if (mbarriers.count((unsigned char*)p)) fail("an mbarrier is initialised twice");
  memcpy(p, kMark, 8);
  mbarriers[(unsigned char*)p] = {count, count, 0, 0};
}
// The address of another block of the cluster that corresponds to one of this block.
static unsigned char* mapped(void* p, int rank) {
  uint32_t at = shared_address(p);
  if (rank < 0 || rank >= cluster_size) fail("no block of this rank in the cluster");
  if (!blocks[rank].running) fail("the block of the cluster that is meant has ended");
  return blocks[rank].shared + at;
}
static void settle(MBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) { b.pending = b.count; b.phase++; }
}
static void mbarrier_arrive(void* p, long bytes) {
  MBarrier& b = mbarrier(p);
  if (b.pending == 0) fail("more arrivals at an mbarrier than it expects in a phase");
  b.bytes += bytes;
  b.pending--;
  settle(b);
}
static void mbarrier_wait(void* p, int parity) {
  MBarrier& b = mbarrier(p);
  if (parity & ~1) fail("an mbarrier's parity is 0 or 1");
  wait_until([&b, parity] { return (int)(b.phase & 1) != parity; }, "the wait for an mbarrier");
}
static void bulk_load(void* to, const void* from, int bytes, void* barrier, unsigned mask) {
  uint32_t at = shared_address(to);
  if (at % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes <= 0) fail("a bulk copy of unaligned or no bytes");
  if (at + (uint32_t)bytes > (uint32_t)kShared) fail("a bulk copy past the end of shared memory");
  (void)*(volatile const char*)from, (void)*((volatile const char*)from + bytes - 1);
  async_used = true;
  for (int rank = 0; rank < 16; rank++) {
    if (!(mask >> rank & 1)) continue;
    unsigned char* there = mapped(to, rank);
    MBarrier& b = mbarrier(mapped(barrier, rank));
    under_way.push_back([=, &b] {
      if (!blocks[rank].running) fail("a bulk copy to a block of the cluster that has ended");
      memcpy(there, from, bytes);
      memcpy(async_memory[rank] + at, from, bytes);
      b.bytes -= bytes;
      settle(b);
    });
  }
}

// ---- wgmma
// The matrix descriptor's address of 16-byte unit `unit` of row `row`, K-major (PTX ISA, "Matrix descriptor format",
// "Strides"; CUTLASS mma_sm90_desc.hpp, mma_traits_sm90_gmma.hpp: Swizzle<B,4,3> of the byte address).
static inline uint32_t wgmma_address(uint64_t d, int row, int unit) {
  uint32_t start = (d & 0x3fff) << 4, lead = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
  int base = d >> 49 & 7, mode = d >> 62 & 3, bits = mode == 0 ? 0 : 4 - mode;  // 0: none, 1: 128, 2: 64, 3: 32 bytes
  uint32_t at = start + row / 8 * stride + row % 8 * (16u << bits) + (bits ? unit * 16 : unit * lead);
  return at ^ ((((at >> 7) - base) & ((1 << bits) - 1)) << 4);
}
struct Product;
typedef void (*Multiply)(Product&);
struct Product {
  const char* name;
  Multiply multiply;
  int n, lanes = 0;
  bool add, done = false;
  uint64_t a, b;
  unsigned char* d[kGroup];          // where the thread's accumulators are
  unsigned registers[kGroup][4];     // A from registers
  unsigned meta[kGroup];
};
struct Accumulators { unsigned char* at; std::vector<unsigned char> value; int uses; };
struct Warpgroup {
  std::vector<Product*> products;                  // issued, oldest first
  std::vector<size_t> ends;                        // products until the end of each committed group
  size_t base = 0, issued[kGroup] = {};            // number of the oldest; products a thread has issued
  size_t commits = 0, committed[kGroup] = {};
  std::vector<Accumulators> held[kGroup];          // of a thread, while products use them
  std::map<unsigned char*, long> released[kGroup];  // fence count when registers were last given back
  long fences[kGroup] = {};
};
static std::map<std::pair<int, int>, Warpgroup> warpgroups;
static Warpgroup& warpgroup() { return warpgroups[{here->rank, self->id.x / kGroup}]; }
static void wgmma_fence() { warpgroup().fences[self->id.x % kGroup]++; }
static void wgmma_run(Warpgroup& g, size_t until) {
  for (size_t i = 0; i < until; i++)
    if (!g.products[i]->done) {
      if (g.products[i]->lanes != kGroup) fail("wgmma that not all warps of the warpgroup have issued");
      g.products[i]->multiply(*g.products[i]);
      g.products[i]->done = true;
    }
}
static Accumulators& accumulators(Warpgroup& g, int lane, unsigned char* at) {
  for (auto& a : g.held[lane]) if (a.at == at) return a;
  fail("wgmma lost its accumulators");
}
static void wgmma_issue(const char* name, Multiply multiply, int n, void* d, uint64_t a, uint64_t b, bool add,
                        const unsigned* registers, const unsigned* meta) {
  Warpgroup& g = warpgroup();
  int lane = self->id.x % kGroup;
  if (block_size.x < (self->id.x / kGroup + 1) * kGroup) fail("wgmma needs a whole warpgroup of 128 threads");
  auto* at = (unsigned char*)d;
  size_t size = n * 2, held = 0;  // n / 2 accumulators of 4 bytes
  for (auto& x : g.held[lane]) {
    if (x.at == at && x.value.size() == size) { x.uses++; held = 1; }
    else if (x.at < at + size && at < x.at + x.value.size()) fail("two wgmma under way share some accumulators");
  }
  if (!held) {
    auto was = g.released[lane].find(at);
    if (g.fences[lane] <= (was == g.released[lane].end() ? 0 : was->second))
      fail("accumulators of a wgmma without a wgmma.fence since they were last free");
    g.held[lane].push_back({at, std::vector<unsigned char>(at, at + size), 1});
    memset(at, 0xff, size);
  }
  size_t i = g.issued[lane]++ - g.base;
  if (i == g.products.size()) {
    auto* made = new Product{name, multiply, n, 0, add};
    made->a = a;
    made->b = b;
    g.products.push_back(made);
  }
  Product& p = *g.products[i];
  if (strcmp(p.name, name) || p.a != a || p.b != b || p.add != add)
    fail("threads of a warpgroup issue different wgmma");
  p.d[lane] = at;
  if (registers) memcpy(p.registers[lane], registers, 16);
  p.meta[lane] = meta ? *meta : 0;
  if (++p.lanes == kGroup && random_word() % 2) wgmma_run(g, i + 1);
}
static void wgmma_commit() {
  Warpgroup& g = warpgroup();
  int lane = self->id.x % kGroup;
  size_t end = g.issued[lane], i = g.committed[lane]++ - g.commits;
  if (i == g.ends.size()) g.ends.push_back(end);
  else if (g.ends[i] != end) fail("threads of a warpgroup commit different wgmma");
}
static void wgmma_wait(size_t left) {
  together<int, int>("wgmma.wait_group", kGroup, 0, [left](const int*, int* o) {
    Warpgroup& g = warpgroup();
    for (int l = 0; l < kGroup; l++) o[l] = 0;
    if (g.ends.size() <= left) return;
    size_t groups = g.ends.size() - left, end = g.ends[groups - 1] - g.base;
    wgmma_run(g, end);
    for (size_t i = 0; i < end; i++) {
      Product* p = g.products[i];
      for (int l = 0; l < kGroup; l++) {
        Accumulators& x = accumulators(g, l, p->d[l]);
        if (--x.uses) continue;
        for (size_t k = 0; k < x.value.size(); k++)
          if (x.at[k] != 0xff) fail("accumulators were written while a wgmma used them");
        memcpy(x.at, x.value.data(), x.value.size());
        g.released[l][x.at] = g.fences[l];
        g.held[l].erase(g.held[l].begin() + (&x - g.held[l].data()));
      }
      delete p;
    }
    g.products.erase(g.products.begin(), g.products.begin() + end);
    g.base += end;
    g.ends.erase(g.ends.begin(), g.ends.begin() + groups);
    g.commits += groups;
  });
}
// The k-th non-zero's place in a group of four: two bits of metadata each (PTX ISA, "Sparse matrix storage").
// Words: 16-bit elements, of lane l and selector s, l % 4 / 2 == s: row l / 4 + 16 warp (low half) and 8 more (high
// half), k 16 (l % 2) ..; 8-bit elements: row l / 4 + 8 (l % 2) + 16 warp, k 32 (l / 2 % 2) .. (CUTLASS
// mma_traits_sm90_gmma_sparse.hpp ELayout_64x32, ELayout_64x64; PTX ISA figures of mma.sp.m16n8k32 and m16n8k64).
static inline unsigned wgmma_meta(const Product& p, int size, int selector, int row, int group) {
  int quad = row / 16 * 32 + row % 8 * 4, high = row / 8 % 2;
  unsigned word, at;
  if (size == 2) { word = p.meta[quad + 2 * selector + group / 4]; at = 16 * high + group % 4 * 4; }
  else { word = p.meta[quad + high + group / 8 * 2]; at = group % 8 * 4; }
  return word >> at & 15;
}
template <class Wide, class Sum, int size, class ReadA, class ReadB>
static void multiply(Product& p, bool registers, bool sparse, int selector, ReadA read_a, ReadB read_b) {
  constexpr int per = 16 / size, kept = 32 / size;
  int k = sparse ? 2 * kept : kept;
  static Wide A[64][64], B[256][64];
  for (int m = 0; m < 64; m++) {
    Wide row[kept];
    for (int i = 0; i < kept; i++) {
      const unsigned char* at;
      if (registers) {  // as mma.m16n8k(32 bytes): register 2 (half of k) + (row / 8 % 2) of lane 4 (row % 8) + ..
        int byte = i * size, lane = m / 16 * 32 + m % 8 * 4 + byte % 16 / 4;
        at = (unsigned char*)&p.registers[lane][byte / 16 * 2 + m / 8 % 2] + byte % 4;
      } else {
        at = async_view() + wgmma_address(p.a, m, i / per) % kShared + i % per * size;
      }
      row[i] = read_a(at);
    }
    if (!sparse) { for (int i = 0; i < k; i++) A[m][i] = row[i]; continue; }
    for (int i = 0; i < k; i++) A[m][i] = 0;
    for (int group = 0; group < k / 4; group++) {
      unsigned two = wgmma_meta(p, size, selector, m, group), first = two & 3, second = two >> 2;
      if (first >= second) fail("sparse metadata whose indices do not ascend");
      A[m][4 * group + first] = row[2 * group];
      A[m][4 * group + second] = row[2 * group + 1];
    }
  }
  for (int n = 0; n < p.n; n++)
    for (int i = 0; i < k; i++)
      B[n][i] = read_b(async_view() + wgmma_address(p.b, n, i / per) % kShared + i % per * size);
  Warpgroup& g = warpgroup();
  for (int l = 0; l < kGroup; l++) {
    Sum* d = (Sum*)accumulators(g, l, p.d[l]).value.data();
    for (int i = 0; i < p.n / 2; i++) {
      int m = l / 32 * 16 + l % 32 / 4 + 8 * (i / 2 % 2), n = i / 4 * 8 + l % 4 * 2 + i % 2;
      Wide s = p.add ? (Wide)d[i] : 0;
      for (int x = 0; x < k; x++) s += A[m][x] * B[n][x];
      d[i] = (Sum)s;
    }
  }
}
static void forget_hopper() {
  for (auto& u : unfenced) u.clear();
  mbarriers.clear();
  for (auto& g : warpgroups) for (auto* p : g.second.products) delete p;
  warpgroups.clear();
  if (async_used) memset(async_memory, 0xff, (size_t)cluster_size * kShared);
  async_used = false;
}
static const bool hopper_ready = [] {
  memset(async_memory, 0xff, sizeof async_memory);
  on_staged = note_staged;
  resets.push_back(forget_hopper);
  return true;
}();
}  // namespace bw
