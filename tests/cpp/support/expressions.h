// An IExprBuilder outside TensorRT: constants fold as TensorRT's do, everything else is symbolic and can be evaluated for chosen sizes.
// TensorRT's headers let a subclass set the implementation (mImpl) that IExprBuilder and IDimensionExpr forward to.
#pragma once

#include "NvInferRuntime.h"

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <vector>

namespace driver {

using Sizes = std::vector<int64_t>;

class Expression final : public nvinfer1::IDimensionExpr {
 public:
  struct Impl final : nvinfer1::apiv::VDimensionExpr {
    bool constant = false;
    int64_t value = 0;
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : std::numeric_limits<int64_t>::min(); }
    bool isSizeTensor() const override { return false; }
  };
  Expression(bool constant, int64_t value, std::function<int64_t(const Sizes &)> at) : at(std::move(at)) {
    impl.constant = constant;
    impl.value = value;
    mImpl = &impl;
  }
  ~Expression() noexcept override = default;
  std::function<int64_t(const Sizes &)> at;

 private:
  Impl impl;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder {
 public:
  ExpressionBuilder() : impl_(*this) { mImpl = &impl_; }
  ~ExpressionBuilder() noexcept override = default;

  const Expression *symbol(size_t index) {
    return make(false, 0, [index](const Sizes &sizes) { return sizes.at(index); });
  }

 private:
  struct Impl final : nvinfer1::apiv::VExprBuilder {
    explicit Impl(ExpressionBuilder &owner) : owner(owner) {}
    const nvinfer1::IDimensionExpr *constant(int64_t value) override {
      return owner.make(true, value, [value](const Sizes &) { return value; });
    }
    const nvinfer1::IDimensionExpr *operation(nvinfer1::DimensionOperation op, const nvinfer1::IDimensionExpr &a, const nvinfer1::IDimensionExpr &b) override {
      const auto &x = static_cast<const Expression &>(a), &y = static_cast<const Expression &>(b);
      const auto apply = [op](int64_t p, int64_t q) -> int64_t {
        using Op = nvinfer1::DimensionOperation;
        switch (op) {
          case Op::kSUM:
            return p + q;
          case Op::kPROD:
            return p * q;
          case Op::kMAX:
            return p > q ? p : q;
          case Op::kMIN:
            return p < q ? p : q;
          case Op::kSUB:
            return p - q;
          case Op::kEQUAL:
            return p == q;
          case Op::kLESS:
            return p < q;
          case Op::kFLOOR_DIV:
            return p / q;
          case Op::kCEIL_DIV:
            return (p + q - 1) / q;
        }
        return 0;
      };
      const bool fold = x.isConstant() && y.isConstant();
      const auto at_x = x.at, at_y = y.at;
      return owner.make(fold, fold ? apply(x.getConstantValue(), y.getConstantValue()) : 0, [=](const Sizes &s) { return apply(at_x(s), at_y(s)); });
    }
    const nvinfer1::IDimensionExpr *declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr &, const nvinfer1::IDimensionExpr &) override { return nullptr; }
    ExpressionBuilder &owner;
  };

  const Expression *make(bool constant, int64_t value, std::function<int64_t(const Sizes &)> at) { return &pool_.emplace_back(constant, value, std::move(at)); }

  std::deque<Expression> pool_;
  Impl impl_;
};

}  // namespace driver
