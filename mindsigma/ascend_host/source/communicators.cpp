// Communicators of HCCL: groups of processes that found each other by a root info, a rank table or a group they are in.
#include <sys/random.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>

#include "hccl.h"

namespace {

constexpr uint64_t MOST_ITEMS = 0x7FFFFFFFF;  // SYS_MAX_COUNT of HCCL
constexpr size_t NAME_BYTES = 128;            // COMM_NAME_MAX_LENGTH
constexpr uint32_t CAPABILITIES = 7;          // of HcclCommConfigCapability
constexpr uint64_t NO_SUBGROUP = 0xFFFFFFFF;  // of a rank that takes no part

std::mutex guard;
std::map<void *, Group> groups;  // by handle

void open_group(const std::string &name, uint32_t count, uint32_t rank, void **handle) {
  demand(handle, BAD_POINTER, "no place for the communicator");
  Group made = std::make_shared<SharedGroup>(name, count, rank);
  std::lock_guard<std::mutex> held(guard);
  groups[*handle = made.get()] = made;
}

std::string random_name() {
  uint64_t random[2];
  demand(getrandom(random, sizeof random, 0) == sizeof random, SYSTEM_CALL, "no random numbers");
  return text("mindsigma-hccl-%016lx%016lx", random[0], random[1]);
}

}  // namespace

Group group_of(void *handle) {
  demand(handle, BAD_POINTER, "no communicator");
  std::lock_guard<std::mutex> held(guard);
  auto found = groups.find(handle);
  demand(found != groups.end(), NOT_FOUND, "a communicator that is not open");
  return found->second;
}

const KindFacts &facts(int kind) {
  demand(kind >= 0 && kind < KINDS, NOT_SUPPORTED, "data type %d; CANN takes int8 to float64 and bfloat16", kind);
  return FACTS[kind];
}

void check(uint64_t count, int kind, const void *buffer, const char *name) {
  size_t bytes = facts(kind).bytes;
  demand(count <= MOST_ITEMS, BAD_PARAMETER, "count %lu; CANN takes at most %lu", count, MOST_ITEMS);
  demand(buffer, BAD_POINTER, "%s is null", name);
  demand(reinterpret_cast<uintptr_t>(buffer) % bytes == 0, BAD_PARAMETER, "%s of %s is not aligned to %zu bytes", name,
         FACTS[kind].name, bytes);
}

void check_rank(const SharedGroup &group, uint32_t rank, const char *name) {
  demand(rank < group.count, BAD_PARAMETER, "%s %u of %u ranks", name, rank, group.count);
}

extern "C" {

// A root info is a name, which the ranks got from each other.
int HcclGetRootInfo(char *info) {
  return answer(__func__, [&] {
    demand(info, BAD_POINTER, "no place for the root info");
    std::string name = random_name();
    std::memcpy(info, name.c_str(), name.size() + 1);
  });
}

int HcclCommInitRootInfo(uint32_t count, const char *info, uint32_t rank, void **comm) {
  return answer(__func__, [&] {
    demand(info, BAD_POINTER, "no root info");
    std::string name(info, strnlen(info, NAME_BYTES));
    demand(!name.rfind("mindsigma-hccl-", 0), BAD_PARAMETER, "a root info that HcclGetRootInfo did not give");
    open_group(name, count, rank, comm);
  });
}
int HcclCommInitRootInfoConfig(uint32_t count, const char *info, uint32_t rank, const void *, void **comm) {
  return HcclCommInitRootInfo(count, info, rank, comm);
}

// From a rank table: a file in JSON that names every rank of every server.
int HcclCommInitClusterInfo(const char *path, uint32_t rank, void **comm) {
  return answer(__func__, [&] {
    demand(path, BAD_POINTER, "no rank table");
    std::ifstream file(path);
    std::string table{std::istreambuf_iterator<char>(file), {}};
    auto times = [&](const char *key) {
      std::regex pattern(text("\"%s\"\\s*:", key));
      return std::distance(std::sregex_iterator(table.begin(), table.end(), pattern), std::sregex_iterator());
    };
    demand(times("rank_id") > 0, BAD_PARAMETER, "%s names no ranks", path);
    demand(times("server_id") == 1, BAD_PARAMETER, "%s names %zd servers; this host is one", path, times("server_id"));
    open_group(text("mindsigma-hccl-table-%zx", std::hash<std::string>()(path + table)), times("rank_id"), rank, comm);
  });
}
int HcclCommInitClusterInfoConfig(const char *path, uint32_t rank, void *, void **comm) {
  return HcclCommInitClusterInfo(path, rank, comm);
}

int HcclCreateSubCommConfig(void **comm, uint32_t count, const uint32_t *ranks, uint64_t id, uint32_t rank, void *,
                            void **made) {
  return answer(__func__, [&] {
    demand(comm, BAD_POINTER, "no communicator");
    Group whole = group_of(*comm);
    if (!ranks && id == NO_SUBGROUP) return;
    demand(ranks, BAD_POINTER, "no ranks");
    demand(rank < count && ranks[rank] == whole->rank, BAD_PARAMETER, "rank %u is not rank %u of the sub-group",
           whole->rank, rank);
    std::vector<uint32_t> sorted(ranks, ranks + count);
    std::sort(sorted.begin(), sorted.end());
    check_rank(*whole, sorted.back(), "rank");
    demand(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), BAD_PARAMETER, "a rank is named twice");
    std::string name = whole->name + text("-%lx", id);
    demand(name.size() < 100, NOT_SUPPORTED, "sub-groups of sub-groups that deep");
    open_group(name, count, rank, made);
  });
}

int HcclCommDestroy(void *comm) {
  return answer(__func__, [&] {
    group_of(comm);
    std::lock_guard<std::mutex> held(guard);
    groups.erase(comm);
  });
}

int HcclGetRankSize(void *comm, uint32_t *count) {
  return answer(__func__, [&] { *count = group_of(comm)->count; });
}
int HcclGetRankId(void *comm, uint32_t *rank) {
  return answer(__func__, [&] { *rank = group_of(comm)->rank; });
}
int HcclGetCommName(void *comm, char *name) {
  return answer(__func__, [&] { std::snprintf(name, NAME_BYTES, "%s", group_of(comm)->name.c_str()); });
}
int HcclGetCommAsyncError(void *comm, int *error) {
  return answer(__func__, [&] { *error = group_of(comm)->failed(); });
}
uint32_t HcclGetCommConfigCapability() { return CAPABILITIES; }
int HcclSetConfig(int, int) { return SUCCESS; }  // deterministic sums, which they always are here
const char *HcclGetErrorString(int code) {
  switch (code) {
    case SUCCESS: return "no error";
    case BAD_PARAMETER: return "parameter error";
    case BAD_POINTER: return "empty pointer";
    case NOT_SUPPORTED: return "feature not supported";
    case NOT_FOUND: return "resource not found";
    case SYSTEM_CALL: return "call of the system failed";
    case TIMED_OUT: return "timeout";
    case REMOTE: return "a remote process ended";
    default: return "unknown error";
  }
}

// Where the first process of a large cluster listens: MindSpore goes on without it.
int HcclSetGlobalCommInfo(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t) { return NOT_SUPPORTED; }

// The executor of operations in graphs of ge, which MindSpore opens and closes; it has nothing to execute.
int HcomExecInitialize() { return SUCCESS; }
int HcomExecFinalize() { return SUCCESS; }
int HcomDestroy() { return SUCCESS; }
}
