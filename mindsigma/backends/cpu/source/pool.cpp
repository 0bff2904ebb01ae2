// Threads that share the tasks of a loop: who waits spins for 200 microseconds at most, as the end or the next loop is
// near, and then sleeps.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace {

// Not OMP_NUM_THREADS, which MindSpore sets itself, to half of the cores.
int allowed_threads() {
  cpu_set_t set;
  int count = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const char* text = getenv("MINDSIGMA_THREADS");
  int wanted = text ? atoi(text) : 0;
  if (wanted > 0 && wanted < count) count = wanted;
  return count < 1 ? 1 : count;
}

// Numbers below the normal range are taken for 0 while the tasks run: what multiplies with them takes a hundred times
// as long, and gradients hold many.
struct WithoutTinyNumbers {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  WithoutTinyNumbers() { _mm_setcsr(before | 0x8040); }
  ~WithoutTinyNumbers() { _mm_setcsr(before); }
#endif
};

// A loop ends when its tasks are done, not when all threads have seen it: on a busy machine a thread may not be given a
// core for longer than the whole loop takes, and the others do its share.
struct Pool {
  static constexpr uint64_t NONE = 0xffffffff;  // in place of a task; there are never so many

  int threads;
  std::mutex turn;  // one loop at a time
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<uint64_t> state{0};  // number of the loop, and in the lower half the first task that nobody has taken
  std::atomic<const std::function<void(long)>*> body{nullptr};
  std::atomic<long> tasks{0}, unfinished{0};

  explicit Pool(int count) : threads(count) {
    for (int i = 1; i < threads; i++) std::thread([this] { serve(); }).detach();
  }

  static uint64_t loop_of(uint64_t state) { return state >> 32; }

  template <class F>
  static void spin(F over) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!over() && std::chrono::steady_clock::now() < end) {
#if defined(__SSE2__)
      _mm_pause();
#endif
    }
  }

  // Take tasks while there are any. What was read of a loop that has ended meanwhile is not used: its state has changed.
  void take() {
    WithoutTinyNumbers mode;
    uint64_t now = state.load();
    for (;;) {
      const long task = now & NONE, count = tasks.load();
      const auto* f = body.load();
      if (task >= count) return;
      if (!state.compare_exchange_weak(now, now + 1)) continue;
      (*f)(task);
      if (unfinished.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
      now = state.load();
    }
  }

  void serve() {
    uint64_t seen = 0;
    auto called = [&] { return loop_of(state.load()) != seen; };
    for (;;) {
      spin(called);
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, called);
      }
      seen = loop_of(state.load());
      take();
    }
  }

  // Whether the loop was run: not while another one is.
  bool run(long count, const std::function<void(long)>& f) {
    std::unique_lock<std::mutex> guard(turn, std::try_to_lock);
    if (!guard) return false;
    const uint64_t before = state.load();
    state.store(before | NONE);  // whoever has read the last loop takes nothing of what is set now
    tasks.store(count);
    unfinished.store(count);
    body.store(&f);
    {
      std::lock_guard<std::mutex> lock(mutex);
      state.store((loop_of(before) + 1) << 32);
    }
    wake.notify_all();
    take();
    auto idle = [&] { return unfinished.load() == 0; };
    spin(idle);
    if (!idle()) {
      std::unique_lock<std::mutex> lock(mutex);
      done.wait(lock, idle);
    }
    return true;
  }
};

Pool* pool = nullptr;  // never freed: its threads live as long as the process
std::mutex making;
std::atomic<int> apart{0};  // threads of the caller's that compute apart

Pool& the_pool() {
  std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) pool = new Pool(allowed_threads());
  return *pool;
}

constexpr long HUGE_PAGE = 2 << 20;  // fewer of them are looked up where the system has them

struct Buffer {
  float* data = nullptr;
  long size = 0;
  ~Buffer() { free(data); }

  float* hold(long floats) {
    if (size < floats) {
      free(data);
      const size_t page = floats * 4 < HUGE_PAGE ? 64 : HUGE_PAGE, bytes = (floats * 4 + page - 1) / page * page;
      data = static_cast<float*>(aligned_alloc(page, bytes));
      size = data ? floats : 0;
      if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (page == HUGE_PAGE) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    return data;
  }
};

Buffer* workspace = new Buffer;  // never freed: a thread may still compute when the process ends
std::mutex using_workspace;

// A fork has this thread alone: the pool's are gone, and whatever another one held would stay locked for ever. So the
// child begins anew. What the other threads computed with is left as it is; it counts for nothing while nobody writes.
void begin_anew() {
  pool = nullptr;
  apart = 0;
  workspace = new Buffer;
  new (&making) std::mutex;
  new (&using_workspace) std::mutex;
}

const int registered = pthread_atfork(nullptr, nullptr, begin_anew);

}  // namespace

int thread_count() { return the_pool().threads; }

int sharing_threads() { return apart < thread_count() ? thread_count() : 1; }

void parallel(long tasks, const std::function<void(long)>& f) {
  if (tasks > 1 && sharing_threads() > 1 && the_pool().run(tasks, f)) return;
  WithoutTinyNumbers mode;
  for (long task = 0; task < tasks; task++) f(task);
}

void compute_apart(int more) { apart += more; }

float* scratch(int place, long floats) {
  static thread_local Buffer buffers[4];
  return buffers[place].hold(floats);
}

Workspace::Workspace(long size) {
  using_workspace.lock();
  try {
    floats = workspace->hold(size);
  } catch (...) {
    using_workspace.unlock();
    throw;
  }
}

Workspace::~Workspace() { using_workspace.unlock(); }
