// The library for any CPU of the architecture it is compiled for.
#include "abi.h"
