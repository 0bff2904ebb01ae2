// The objects of namespace ge that MindSpore makes while it loads, laid out as its own build expects (old C++ ABI).
//
// Graphs of ge are never built here: graphs run as single kernels. What only they would need is generated, and ends the
// run by name.
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {

struct OperatorImpl;

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  const char *GetString() const;
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
};
AscendString::AscendString(const char *text) : name_(std::make_shared<std::string>(text ? text : "")) {}
const char *AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
bool AscendString::operator<(const AscendString &other) const { return std::string(GetString()) < other.GetString(); }

class Tensor;
enum DataType : int;

// MindSpore makes one of a legacy kernel to ask for the attributes that ge would fill in; there are none, and the
// kernels here know their own.
class Operator {
 public:
  Operator() = default;
  virtual ~Operator() = default;

  uint32_t GetAttr(const char *, bool &) const;
  uint32_t GetAttr(const char *, int &) const;
  uint32_t GetAttr(const char *, int64_t &) const;
  uint32_t GetAttr(const char *, float &) const;
  uint32_t GetAttr(const char *, DataType &) const;
  uint32_t GetAttr(const char *, Tensor &) const;
  uint32_t GetAttr(const char *, std::vector<int> &) const;
  uint32_t GetAttr(const char *, std::vector<int64_t> &) const;
  uint32_t GetAttr(const char *, std::vector<float> &) const;
  uint32_t GetAttr(const char *, std::vector<DataType> &) const;
  uint32_t GetAttr(const char *, std::vector<std::vector<int64_t>> &) const;
  uint32_t GetAttr(const std::string &, std::string &) const;
  uint32_t GetAttr(const std::string &, std::vector<std::string> &) const;

 private:
  std::shared_ptr<OperatorImpl> implementation_;
};
constexpr uint32_t ABSENT = 0xFFFFFFFF;  // GRAPH_FAILED
uint32_t Operator::GetAttr(const char *, bool &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, int &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, int64_t &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, float &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, DataType &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, Tensor &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, std::vector<int> &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, std::vector<int64_t> &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, std::vector<float> &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, std::vector<DataType> &) const { return ABSENT; }
uint32_t Operator::GetAttr(const char *, std::vector<std::vector<int64_t>> &) const { return ABSENT; }
uint32_t Operator::GetAttr(const std::string &, std::string &) const { return ABSENT; }
uint32_t Operator::GetAttr(const std::string &, std::vector<std::string> &) const { return ABSENT; }

class OperatorFactory {
 public:
  static Operator CreateOperator(const char *, const char *);
  static Operator CreateOperator(const std::string &, const std::string &);
  static bool IsExistOp(const char *);
  static bool IsExistOp(const std::string &);
};
Operator OperatorFactory::CreateOperator(const char *, const char *) { return {}; }
Operator OperatorFactory::CreateOperator(const std::string &, const std::string &) { return {}; }
bool OperatorFactory::IsExistOp(const char *) { return true; }
bool OperatorFactory::IsExistOp(const std::string &) { return true; }

// MindSpore's custom operators announce themselves to ge as they are loaded; nobody asks for them here.
class InferShapeFuncRegister {
 public:
  InferShapeFuncRegister(const std::string &, const std::function<uint32_t(Operator &)> &);
};
InferShapeFuncRegister::InferShapeFuncRegister(const std::string &, const std::function<uint32_t(Operator &)> &) {}

class OperatorCreatorRegister {
 public:
  OperatorCreatorRegister(const char *, const std::function<Operator(const AscendString &)> &);
  OperatorCreatorRegister(const std::string &, const std::function<Operator(const std::string &)> &);
};
OperatorCreatorRegister::OperatorCreatorRegister(const char *, const std::function<Operator(const AscendString &)> &) {}
OperatorCreatorRegister::OperatorCreatorRegister(const std::string &,
                                                 const std::function<Operator(const std::string &)> &) {}

uint32_t GEInitialize(const std::map<std::string, std::string> &);
uint32_t GEInitialize(const std::map<std::string, std::string> &) { return 0; }
uint32_t GEFinalize();
uint32_t GEFinalize() { return 0; }

}  // namespace ge
