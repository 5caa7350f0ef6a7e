/* What compilers and systems call differently: GCC, Clang and MSVC; Linux, macOS and Windows. */
#ifndef PORTABLE_H
#define PORTABLE_H
#include <stdint.h>
#include <stdlib.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#pragma fp_contract(off)
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(_WIN32)
#include <malloc.h>
#define EXPORT __declspec(dllexport)
#define ALIGNED(bytes) _aligned_malloc(bytes, 64)
#define FREE_ALIGNED _aligned_free
#else
#define EXPORT
#define ALIGNED(bytes) aligned_alloc(64, ((bytes) + 63) / 64 * 64)
#define FREE_ALIGNED free
#endif

/* Declared here: Apple's compiler has OpenMP without its header. */
#if defined(_OPENMP)
int omp_get_thread_num(void);
#else
INLINE int omp_get_thread_num(void) { return 0; }
#endif

#endif
