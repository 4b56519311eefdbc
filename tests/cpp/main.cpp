// plugin_driver LIBRARY [TENSORRT | -] [quick]
// TENSORRT is a libnvinfer, libnvinfer_lean or libtensorrt_rtx whose registry loads the plugin; without it the plugin is opened alone.
// quick: calls in bfloat16 alone, for slow instruments.
#include "driver.h"

#include <cstring>

int main(int argc, char **argv) {
  using namespace driver;
  const bool quick = argc == 4 && std::strcmp(argv[3], "quick") == 0;
  if (argc < 2 || argc > 4 || (argc == 4 && !quick)) {
    std::fprintf(stderr, "usage: %s LIBRARY [TENSORRT | -] [quick]\n", argv[0]);
    return 2;
  }
  // A crash must not swallow what was found before it.
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Library library(argv[1], argc > 2 && std::strcmp(argv[2], "-") != 0 ? argv[2] : "");
  if (library.creator() == nullptr) {
    std::printf("FAILED to open: %s\n", library.error().c_str());
    return 1;
  }
  check_life_cycle(library);
  check_calls(library, quick);
  if (library.registry() != nullptr) {
    int32_t before = 0, after = 0;
    library.registry()->getAllCreators(&before);
    library.unload();
    library.registry()->getAllCreators(&after);
    CHECK(after == before - 1);
    CHECK(library.registry()->getCreator("SampleAttention", "1", "") == nullptr);
  }
  std::printf("%ld checks passed, %ld failed\n", tally.passed, tally.failed);
  return tally.failed == 0 ? 0 : 1;
}
