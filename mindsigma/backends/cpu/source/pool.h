// Threads that share the tasks of a loop. Which thread runs which task never changes a result.
#pragma once
#include <functional>

// Threads that take part in `parallel`.
int thread_count();

// Threads among which a loop that begins now is shared.
int sharing_threads();

// Call f(task) for every task of 0 ... tasks - 1, and return when all have been done.
void parallel(long tasks, const std::function<void(long)>& f);

// So many more threads of the caller's, or fewer, compute things of their own. While there are as many of them as
// `thread_count`, each runs its loops alone.
void compute_apart(int more);

// Memory of this thread for intermediate results, `place` 0 ... 3, valid until the next call for the same place.
float* scratch(int place, long floats);

// Memory for the intermediate results of a whole call, kept for the next one; there is one, so that calls take turns.
struct Workspace {
  explicit Workspace(long floats);
  ~Workspace();
  float* floats;
};

// Consecutive parts of one piece of memory.
struct Memory {
  float* next;
  float* take(long floats) {
    float* start = next;
    next += floats;
    return start;
  }
};
