// The library for AVX2 with FMA: the compiler flags in pyproject.toml make it so.
#include "abi.h"
