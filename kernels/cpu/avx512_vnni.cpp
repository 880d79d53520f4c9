// The library for AVX-512 with VNNI: the compiler flags in pyproject.toml make it so.
#include "abi.h"
