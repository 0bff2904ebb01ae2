// HCCL between the processes of one host: what its functions share.
//
// The documented limits of the Atlas A2 (910B) are refusals, data go through memory that the processes share, and all
// ranks get the same bits. An operation is done when its function returns, as everything on this host.
#pragma once

#include <cstdio>
#include <memory>

#include "cann.h"
#include "reduce.h"
#include "shared_group.h"

using Group = std::shared_ptr<SharedGroup>;

struct KindFacts {
  const char *name;
  size_t bytes;
  bool reduces;  // on the Atlas A2
};
constexpr KindFacts FACTS[KINDS] = {
    {"int8", 1, true},    {"int16", 2, true},   {"int32", 4, true},    {"float16", 2, true},
    {"float32", 4, true}, {"int64", 8, true},   {"uint64", 8, false},  {"uint8", 1, false},
    {"uint16", 2, false}, {"uint32", 4, false}, {"float64", 8, false}, {"bfloat16", 2, true}};

// The group behind a communicator, or its facts about a data type; refused when there is none.
Group group_of(void *comm);
const KindFacts &facts(int kind);

// Refuse what HCCL refuses of a buffer of so many items, and of a rank's number.
void check(uint64_t count, int kind, const void *buffer, const char *name);
void check_rank(const SharedGroup &group, uint32_t rank, const char *name);

// Run an operation. What it refuses, or what ended it, becomes HCCL's code, the last error's text, and a line of its
// own, since MindSpore shows the code alone.
template <class F>
int answer(const char *name, F run) {
  try {
    run();
    return SUCCESS;
  } catch (const Failure &failure) {
    std::fprintf(stderr, "error: %s: %s\n", name, failure.reason.c_str());
    return fail(failure.code, std::string(name) + ": " + failure.reason);
  }
}
