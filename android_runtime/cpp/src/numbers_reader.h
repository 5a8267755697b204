// Reads a table of 32-bit little-endian numbers that anyone may have written: never beyond its end.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "input_errors.h"

namespace edgeexport {

using Numbers = std::vector<std::uint32_t>;

class NumbersReader {
 public:
  // `where` is for messages. Every method throws tokenizer-unusable.
  NumbersReader(std::string_view data, std::string where) : data_(data), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& problem) const { throw errors::tokenizerUnusable(where_, problem); }

  void require(bool good, const char* problem) const {
    if (!good) fail(problem);
  }

  std::string_view bytes(std::size_t size) {
    require(size <= data_.size() - at_, "it ends too early");
    const std::string_view found = data_.substr(at_, size);
    at_ += size;
    return found;
  }

  // Bytes, and the zeros that make them whole numbers.
  std::string_view paddedBytes(std::size_t size) {
    const std::string_view found = bytes(size);
    for (const char zero : bytes((4 - size % 4) % 4)) require(zero == 0, "its padding is not zero");
    return found;
  }

  std::uint32_t number() {
    const std::string_view found = bytes(4);
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < 4; ++i) value |= std::uint32_t{static_cast<unsigned char>(found[i])} << (8 * i);
    return value;
  }

  Numbers numbers(std::size_t count) {
    require(count <= (data_.size() - at_) / 4, "it ends too early");
    Numbers found(count);
    for (std::uint32_t& each : found) each = number();
    return found;
  }

  // Numbers that are all below `limit`.
  Numbers numbersBelow(std::size_t count, std::uint32_t limit) {
    Numbers found = numbers(count);
    const auto wrong = [&](std::uint32_t each) { return each >= limit; };
    require(std::none_of(found.begin(), found.end(), wrong), "a number is out of bounds");
    return found;
  }

  // Where each of `count` runs starts in a row of `total`, and the end.
  Numbers starts(std::size_t count, std::uint32_t total) {
    Numbers found = numbers(count + 1);
    const bool good = found.front() == 0 && found.back() == total && std::is_sorted(found.begin(), found.end());
    require(good, "runs overlap or leave the table");
    return found;
  }

  void end() const { require(at_ == data_.size(), "there is something after its end"); }

 private:
  std::string_view data_;
  std::string where_;
  std::size_t at_ = 0;
};

}  // namespace edgeexport
