#include "trace.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

void trace_launch(const char *name) {
  static FILE *const file = [] {
    const char *path = std::getenv("MINDSIGMA_HOST_TRACE");
    FILE *opened = path && *path ? std::fopen(path, "a") : nullptr;
    if (opened) std::setvbuf(opened, nullptr, _IOLBF, 1 << 12);
    return opened;
  }();
  if (file) std::fprintf(file, "%d %s\n", static_cast<int>(getpid()), name);
}
