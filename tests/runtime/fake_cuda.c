/* libcuda.so.1 for tests: the driver calls of bitwright's runtime over host memory. Kernels come from the library that
   the emulator compiled (FAKE_KERNELS), with "name arguments" per line in FAKE_ARGUMENTS; FAKE_CAPABILITY is "90". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
typedef int (*Kernel)(void**, const int*, uint64_t);
typedef struct { char name[128]; Kernel run; int count, shared; } Function;
typedef struct { Function* f; int shape[5]; void* a[64]; void *to, *from; size_t n; int set; } Action;
static Action actions[4096];
static int used, capturing;
static void* const side = (void*)0x51de;

static int act(const Action* x) {
  if (x->f) return x->f->run((void**)x->a, x->shape, 1) ? 719 : 0;
  if (x->set) memset(x->to, 0, x->n);
  else memcpy(x->to, x->from, x->n);
  return 0;
}
static int later(Action x, void* stream) {
  if (capturing && stream == side) { actions[used++] = x; return 0; }
  return act(&x);
}

int fake_cuInit(unsigned flags) { return flags ? 1 : 0; }
int fake_cuGetErrorString(int e, const char** text) { *text = e == 719 ? "unspecified launch failure" : "an error"; return 0; }
int fake_cuDeviceGetCount(int* n) { *n = 1; return 0; }
int fake_cuDeviceGet(int* d, int i) { *d = i; return i ? 101 : 0; }
int fake_cuDeviceGetAttribute(int* v, int what, int d) {
  int c = atoi(getenv("FAKE_CAPABILITY"));
  *v = what == 75 ? c / 10 : what == 76 ? c % 10 : what == 97 ? 232448 : -1;
  return d;
}
int fake_cuDeviceGetName(char* name, int n, int d) { snprintf(name, n, "Fake"); return d; }
int fake_cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)0xc0; return d; }
int fake_cuDevicePrimaryCtxRelease(int d) { return d; }
int fake_cuCtxSetCurrent(void* c) { return c == (void*)0xc0 ? 0 : 201; }
int fake_cuStreamCreate(void** s, unsigned flags) { *s = side; return flags == 1 ? 0 : 1; }
int fake_cuStreamDestroy(void* s) { return s == side ? 0 : 400; }
int fake_cuStreamSynchronize(void* s) { return capturing && s == side ? 900 : 0; }
int fake_cuMemAlloc(Address* a, size_t n) { *a = (Address)aligned_alloc(256, (n + 255) / 256 * 256); return *a ? 0 : 2; }
int fake_cuMemFree(Address a) { free((void*)a); return 0; }
int fake_cuMemsetD8Async(Address a, unsigned char v, size_t n, void* s) {
  Action x = {.to = (void*)a, .n = n, .set = 1};
  return v ? 1 : later(x, s);
}
int fake_cuMemcpyHtoDAsync(Address to, const void* from, size_t n, void* s) {
  memcpy((void*)to, from, n);
  return capturing && s == side ? 900 : 0;
}
int fake_cuMemcpyDtoHAsync(void* to, Address from, size_t n, void* s) {
  memcpy(to, (void*)from, n);
  return capturing && s == side ? 900 : 0;
}
int fake_cuMemcpyDtoDAsync(Address to, Address from, size_t n, void* s) {
  Action x = {.to = (void*)to, .from = (void*)from, .n = n};
  return later(x, s);
}
int fake_cuModuleLoadData(void** m, const void* image) { *m = (void*)image; return memcmp(image, "\177ELF", 4) ? 200 : 0; }
int fake_cuModuleUnload(void* m) { return m ? 0 : 400; }
int fake_cuModuleGetFunction(void** f, void* m, const char* name) {
  static void* library;
  if (!library) library = dlopen(getenv("FAKE_KERNELS"), RTLD_NOW);
  Function* made = calloc(1, sizeof *made);
  char symbol[160], line[256], known[128];
  snprintf(symbol, sizeof symbol, "run_%s", name);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->run = library ? (Kernel)dlsym(library, symbol) : 0;
  made->shared = 48 << 10;
  FILE* list = fopen(getenv("FAKE_ARGUMENTS"), "r");
  while (list && fgets(line, sizeof line, list)) {
    int count;
    if (sscanf(line, "%127s %d", known, &count) == 2 && !strcmp(known, name)) made->count = count;
  }
  if (list) fclose(list);
  *f = made;
  return m && made->run && made->count ? 0 : 500;
}
int fake_cuFuncGetAttribute(int* v, int what, Function* f) { *v = 64; return what == 1 && f ? 0 : 1; }
int fake_cuFuncSetAttribute(Function* f, int what, int value) { f->shared = value; return what == 8 && value <= 232448 - 64 ? 0 : 1; }
int fake_cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void* stream, void** params, void** extra) {
  if (by != 1 || bz != 1 || extra || (int)shared > f->shared || f->count > 64) return 1;
  Action x = {.f = f, .shape = {(int)gx, (int)gy, (int)gz, (int)bx, (int)shared}};
  for (int i = 0; i < f->count; i++) x.a[i] = *(void**)params[i];
  return later(x, stream);
}
int fake_cuStreamBeginCapture(void* s, int mode) { used = 0; capturing = 1; return s == side && mode == 1 ? 0 : 1; }
int fake_cuStreamEndCapture(void* s, void** g) { capturing = 0; *g = actions; return s == side ? 0 : 1; }
int fake_cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long flags) { *e = g; return flags ? 1 : 0; }
int fake_cuGraphLaunch(void* e, void* s) {
  (void)s;
  for (int i = 0; i < used; i++) if (act((Action*)e + i)) return 719;
  return 0;
}
int fake_cuEventCreate(void** e, unsigned flags) { *e = malloc(8); return flags ? 1 : 0; }
int fake_cuEventRecord(void* e, void* s) { (void)s; return e ? 0 : 400; }
int fake_cuEventSynchronize(void* e) { return e ? 0 : 400; }
int fake_cuEventElapsedTime(float* ms, void* a, void* b) { *ms = 1.5f; return a && b ? 0 : 400; }
int fake_cuEventDestroy(void* e) { free(e); return 0; }
static int lacking() { return 801; }

int cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long long flags, void* status) {
  char symbol[160];
  (void)version, (void)flags, (void)status;
  snprintf(symbol, sizeof symbol, "fake_%s", name);
  Dl_info here;
  dladdr((void*)cuGetProcAddress_v2, &here);
  *f = dlsym(dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD), symbol);
  if (!*f) *f = (void*)lacking;
  return 0;
}
