// ACL's runtime on a host: device memory is the host's, and a stream has done everything when a call returns.
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

#include "arrays.h"
#include "trace.h"

namespace {

constexpr int OUT_OF_MEMORY = 207001;  // ACL_ERROR_RT_MEMORY_ALLOCATION
constexpr int INVALID = 107000;        // ACL_ERROR_RT_PARAM_INVALID
constexpr size_t ALIGNMENT = 512;      // bytes, as on the device
constexpr size_t GIB = size_t(1) << 30;

struct Context { int device; };
struct Stream { int device; };
struct Event { std::chrono::steady_clock::time_point recorded; };

Context default_context{0};
thread_local Context *current = nullptr;
int device = 0;

std::mutex guard;
std::map<void *, size_t> reserved;  // addresses without memory behind them
std::map<void *, size_t> mapped;
size_t in_use = 0;                  // bytes of aclrtMalloc and mapped ones
std::map<void *, size_t> allocated;

// Memory of the card that is played; the planner asks for cards of 32 and 64 GB.
size_t card_bytes() {
  const char *named = std::getenv("MINDSIGMA_HOST_GIB");
  double gib = named ? std::atof(named) : 0;
  return static_cast<size_t>((gib > 0 ? gib : 64) * GIB);
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

int allocate(void **address, size_t bytes) {
  size_t size = rounded(bytes + 32, ALIGNMENT);  // 32 bytes more, as the device's allocator gives
  std::lock_guard<std::mutex> held(guard);
  if (in_use + size > card_bytes()) return fail(OUT_OF_MEMORY, text("aclrtMalloc: %zu bytes do not fit the card", bytes));
  // Fresh pages: zeros, which the results of a dry run are, and no memory of the host until they are touched.
  void *got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return fail(OUT_OF_MEMORY, text("aclrtMalloc: the host has no %zu bytes", bytes));
  *address = got;
  allocated[*address] = size;
  in_use += size;
  return OK;
}

// An end of the mapping behind an address, 0 when nobody reserved it.
size_t room(std::map<void *, size_t> &ranges, void *address) {
  auto after = ranges.upper_bound(address);
  if (after == ranges.begin()) return 0;
  --after;
  size_t into = static_cast<char *>(address) - static_cast<char *>(after->first);
  return into < after->second ? after->second - into : 0;
}

}  // namespace

extern "C" {

int aclInit(const char *) { return OK; }
int aclFinalize() { return OK; }
int aclnnInit(const char *) { return OK; }
int aclnnFinalize() { return OK; }

// Devices and contexts.
const char *aclrtGetSocName() { return "Ascend910B1"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 64; return OK; }
int aclrtSetDevice(int32_t number) {
  device = number;
  if (!current) current = &default_context;
  return OK;
}
int aclrtResetDevice(int32_t) { return OK; }
int aclrtGetDevice(int32_t *number) { *number = device; return OK; }
int aclrtDeviceGetBareTgid(int32_t *process) { *process = getpid(); return OK; }
int aclrtGetRunMode(int *mode) { *mode = 1; return OK; }  // ACL_HOST: the program does not run on the device itself
int aclrtCreateContext(void **context, int32_t number) { *context = current = new Context{number}; return OK; }
int aclrtDestroyContext(void *context) {
  if (current == context) current = nullptr;
  delete static_cast<Context *>(context);
  return OK;
}
int aclrtSetCurrentContext(void *context) { current = static_cast<Context *>(context); return OK; }
int aclrtGetCurrentContext(void **context) { *context = current ? current : &default_context; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) { *can = 1; return OK; }
int aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return OK; }
int aclrtSynchronizeDeviceWithTimeout(int32_t) { return OK; }

// Settings that only a device can follow: time limits, saturation, callbacks of faults, tuning.
int aclrtSetOpExecuteTimeOut(uint32_t) { return OK; }
int aclrtSetOpWaitTimeout(uint32_t) { return OK; }
int aclrtSetDeviceSatMode(int) { return OK; }
int aclrtSetStreamFailureMode(void *, uint64_t) { return OK; }
int aclrtSetExceptionInfoCallback(void *) { return OK; }
int aclrtCtxSetSysParamOpt(int, int64_t) { return OK; }
int aclSetCompileopt(int, const char *) { return OK; }
int aclrtGetLastError(int) { return OK; }

// Streams and events: work is done when it is launched, so that every event has happened once it is recorded.
int aclrtCreateStream(void **stream) { *stream = new Stream{device}; return OK; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
int aclrtDestroyStream(void *stream) { delete static_cast<Stream *>(stream); return OK; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtSynchronizeStream(void *) { return OK; }
int aclrtSynchronizeStreamWithTimeout(void *, int32_t) { return OK; }
int aclrtStreamQuery(void *, int *status) { *status = 0; return OK; }  // ACL_STREAM_STATUS_COMPLETE
int aclrtStreamWaitEvent(void *, void *) { return OK; }
int aclrtCreateEvent(void **event) { *event = new Event{std::chrono::steady_clock::now()}; return OK; }
int aclrtCreateEventWithFlag(void **event, uint32_t) { return aclrtCreateEvent(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t) { return aclrtCreateEvent(event); }
int aclrtDestroyEvent(void *event) { delete static_cast<Event *>(event); return OK; }
int aclrtRecordEvent(void *event, void *) {
  static_cast<Event *>(event)->recorded = std::chrono::steady_clock::now();
  return OK;
}
int aclrtResetEvent(void *, void *) { return OK; }
int aclrtSynchronizeEvent(void *) { return OK; }
int aclrtQueryEventStatus(void *, int *status) { *status = 1; return OK; }  // ACL_EVENT_RECORDED_STATUS_COMPLETE
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
  auto passed = static_cast<Event *>(end)->recorded - static_cast<Event *>(start)->recorded;
  *milliseconds = std::chrono::duration<float, std::milli>(passed).count();
  return OK;
}
int aclrtEventGetTimestamp(void *event, uint64_t *microseconds) {
  auto since = static_cast<Event *>(event)->recorded.time_since_epoch();
  *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(since).count();
  return OK;
}
int aclrtSubscribeReport(uint64_t, void *) { return OK; }
int aclrtLaunchCallback(void (*function)(void *), void *data, int, void *) { function(data); return OK; }
int aclrtProcessReport(int32_t milliseconds) {  // there is never a report; it is polled
  std::this_thread::sleep_for(std::chrono::milliseconds(std::min(std::max(milliseconds, 1), 100)));
  return OK;
}

// Memory.
int aclrtGetMemInfo(int, size_t *free_bytes, size_t *total) {
  std::lock_guard<std::mutex> held(guard);
  *total = card_bytes();
  size_t system = *total / 16;  // the driver's own share; 60 of 64 GiB are free on a 910B
  *free_bytes = *total - std::min(*total, in_use + system);
  return OK;
}
int aclrtMalloc(void **address, size_t bytes, int) { return allocate(address, bytes); }
int aclrtMallocAlign32(void **address, size_t bytes, int) { return allocate(address, bytes); }
int aclrtFree(void *address) {
  std::lock_guard<std::mutex> held(guard);
  auto found = allocated.find(address);
  if (found == allocated.end()) return fail(INVALID, "aclrtFree: an address that aclrtMalloc did not give");
  in_use -= found->second;
  munmap(address, found->second);
  allocated.erase(found);
  return OK;
}
int aclrtMallocHost(void **address, size_t bytes) {
  *address = std::aligned_alloc(ALIGNMENT, rounded(bytes + 1, ALIGNMENT));
  return *address ? OK : fail(OUT_OF_MEMORY, "aclrtMallocHost: the host has no memory");
}
int aclrtFreeHost(void *address) { std::free(address); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  // aclrtMemcpyKind; a line of the trace each, so that copies in a loop show.
  static const char *const names[] = {"host to host", "host to device", "device to host", "device to device"};
  trace_launch(text("copy %s %zu", kind >= 0 && kind < 4 ? names[kind] : "otherwise", bytes).c_str());
  if (bytes > room) return fail(INVALID, text("aclrtMemcpy: %zu bytes into %zu", bytes, room));
  std::memmove(to, from, bytes);
  return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *) {
  return aclrtMemcpy(to, room, from, bytes, kind);
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return fail(INVALID, text("aclrtMemset: %zu bytes into %zu", bytes, room));
  std::memset(to, value, bytes);
  return OK;
}
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *) {
  return aclrtMemset(to, room, value, bytes);
}

// Virtual memory: reserved addresses get pages of the host as they are touched and give them back when unmapped.
int aclrtReserveMemAddress(void **address, size_t bytes, size_t, void *, uint64_t) {
  void *got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return fail(OUT_OF_MEMORY, text("aclrtReserveMemAddress: no %zu bytes of addresses", bytes));
  std::lock_guard<std::mutex> held(guard);
  reserved[*address = got] = bytes;
  return OK;
}
int aclrtReleaseMemAddress(void *address) {
  std::lock_guard<std::mutex> held(guard);
  auto found = reserved.find(address);
  if (found == reserved.end()) return fail(INVALID, "aclrtReleaseMemAddress: an address that was not reserved");
  munmap(address, found->second);
  reserved.erase(found);
  return OK;
}
int aclrtMallocPhysical(void **handle, size_t bytes, const void *, uint64_t) {
  std::lock_guard<std::mutex> held(guard);
  if (in_use + bytes > card_bytes())
    return fail(OUT_OF_MEMORY, text("aclrtMallocPhysical: %zu bytes do not fit the card", bytes));
  in_use += bytes;
  *handle = new size_t(bytes);
  return OK;
}
int aclrtFreePhysical(void *handle) {
  std::lock_guard<std::mutex> held(guard);
  in_use -= *static_cast<size_t *>(handle);
  delete static_cast<size_t *>(handle);
  return OK;
}
int aclrtMapMem(void *address, size_t bytes, size_t, void *, uint64_t) {
  std::lock_guard<std::mutex> held(guard);
  if (room(reserved, address) < bytes) return fail(INVALID, "aclrtMapMem: addresses that were not reserved");
  mapped[address] = bytes;
  return OK;
}
int aclrtUnmapMem(void *address) {
  std::lock_guard<std::mutex> held(guard);
  auto found = mapped.find(address);
  if (found == mapped.end()) return fail(INVALID, "aclrtUnmapMem: an address that was not mapped");
  madvise(address, found->second, MADV_DONTNEED);
  mapped.erase(found);
  return OK;
}

// An allocator that MindSpore offers to CANN's kernels, none of which asks for memory here.
void *aclrtAllocatorCreateDesc() { return new char; }
int aclrtAllocatorDestroyDesc(void *description) { delete static_cast<char *>(description); return OK; }
int aclrtAllocatorRegister(void *, void *) { return OK; }
int aclrtAllocatorUnregister(void *) { return OK; }
int aclrtAllocatorSetObjToDesc(void *, void *) { return OK; }
int aclrtAllocatorSetAllocFuncToDesc(void *, void *) { return OK; }
int aclrtAllocatorSetFreeFuncToDesc(void *, void *) { return OK; }
int aclrtAllocatorSetAllocAdviseFuncToDesc(void *, void *) { return OK; }
int aclrtAllocatorSetGetAddrFromBlockFuncToDesc(void *, void *) { return OK; }

// Channels of printed and summarised tensors: none is opened, which MindSpore takes as "not supported".
void *acltdtCreateChannelWithCapacity(uint32_t, const char *, size_t) { return nullptr; }
}

// CANN's own log, which is not written.
int DlogFlush();
int DlogFlush() { return OK; }
int CheckLogLevel(int, int);
int CheckLogLevel(int, int) { return 0; }
