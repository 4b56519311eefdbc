#pragma once

#include <cstdio>

namespace driver {

struct Tally {
  long passed = 0, failed = 0;
};
inline Tally tally;

inline bool check(bool ok, const char *file, int line, const char *what) {
  if (ok) {
    ++tally.passed;
  } else if (++tally.failed <= 40) {
    std::printf("FAILED %s:%d: %s\n", file, line, what);
  }
  return ok;
}

}  // namespace driver

#define CHECK(condition) ::driver::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
