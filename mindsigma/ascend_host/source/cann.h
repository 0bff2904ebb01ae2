// CANN's objects as this host has them, and what every kernel is written with.
//
// A kernel is declared with KERNEL(aclnnName, parameters...) and answers CANN's two calls: the first checks what CANN's
// documentation demands and keeps what is to be done, the second does it. Device memory is memory of the host.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

// aclDataType
enum Dtype : int {
  F32 = 0, F16 = 1, I8 = 2, I32 = 3, U8 = 4, I16 = 6, U16 = 7, U32 = 8, I64 = 9, U64 = 10, F64 = 11, BOOL = 12,
  BF16 = 27,
};

using Shape = std::vector<int64_t>;

struct aclTensor {
  int dtype;
  int format;
  Shape shape;
  Shape strides;  // in elements
  int64_t offset;  // in elements
  Shape storage;
  char *data;
};

struct aclScalar {
  int dtype;
  char bytes[16];
};

template <class T>
struct List {
  std::vector<T> values;
};
struct aclIntArray : List<int64_t> {};
struct aclFloatArray : List<float> {};
struct aclBoolArray : List<uint8_t> {};
struct aclTensorList : List<aclTensor *> {};
struct aclScalarList : List<aclScalar *> {};

using Run = std::function<void()>;

struct aclOpExecutor {
  Run run;
  bool repeatable;  // kept by the caller, launched many times, with new addresses in between
};

constexpr int OK = 0;
constexpr int PARAMETER_INVALID = 161002;  // ACLNN_ERR_PARAM_INVALID
constexpr int INNER_ERROR = 561000;        // ACLNN_ERR_INNER

// What is not allowed; the text goes to aclGetRecentErrMsg, where MindSpore takes it for its exception.
struct Refusal {
  std::string reason;
};

std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const Shape &shape);
const char *dtype_name(int dtype);

// Throw a Refusal unless the condition holds.
void require(bool condition, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Refuse a tensor whose dtype is not among those that the documentation lists.
void require_dtype(const aclTensor *tensor, const char *name, std::initializer_list<int> allowed);
void require_same_dtype(const aclTensor *a, const aclTensor *b, const char *names);
void require_shape(const aclTensor *tensor, const char *name, const Shape &shape);
void require_rank(const aclTensor *tensor, const char *name, size_t least, size_t most);

// Put a message where aclGetRecentErrMsg finds it. Returns `code`.
int fail(int code, const std::string &message);

// Answers a kernel's first call: what the plan returns is kept in an executor, what it refuses becomes a code.
struct Keeper {
  const char *function;
  uint64_t *workspace;
  aclOpExecutor **executor;
  int operator+(const std::function<Run()> &plan) const;
};

// Answers a kernel's second call.
int launch(const char *name, aclOpExecutor *executor);

// The two functions of a kernel; a body follows: { PLAN { checks; return [=] { computes }; }; }
#define KERNEL(NAME, ...)                                                                                    \
  extern "C" int NAME(void *, uint64_t, aclOpExecutor *executor, void *) { return launch(#NAME, executor); } \
  extern "C" int NAME##GetWorkspaceSize(__VA_ARGS__, uint64_t *workspace, aclOpExecutor **executor)
#define PLAN return Keeper{__func__, workspace, executor} + [=]() -> Run
