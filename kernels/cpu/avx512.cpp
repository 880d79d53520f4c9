// The library for AVX-512 (F, BW, VL, DQ): the compiler flags in pyproject.toml make it so.
#include "abi.h"
