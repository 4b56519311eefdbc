/* Plain structs of the SampleAttention kernels. C99 and C++17; no CUDA, framework or runtime header is needed to include this file.
 *
 * Letters: B batch, Hq query heads, Hkv key/value heads, S query rows, T keys, D head size of query and key, Dv head size of value.
 * nQ = ceil(S / block_q) query tiles, nK = ceil(T / block_k) key blocks. docs/op.md is the specification of every field of sa_problem. */
#ifndef SAMPLE_ATTENTION_TYPES_H
#define SAMPLE_ATTENTION_TYPES_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SA_ABI_VERSION 3

enum { SA_FLOAT16 = 0, SA_BFLOAT16 = 1, SA_FLOAT32 = 2 };
enum { SA_DENSE = 0, SA_RESIDUE = 1, SA_TILE = 2, SA_COLUMN_SLASH = 3, SA_STRIPE_WINDOW = 4 };

/* Sets of kernels, fastest first. AUTO in a problem; NONE in an answer. */
enum { SA_PATH_AUTO = 0, SA_PATH_NONE = 0, SA_PATH_SM90 = 1, SA_PATH_SM80 = 2, SA_PATH_GENERIC = 3 };

/* Result codes. A code other than SA_OK always comes with one sentence. */
enum { SA_OK = 0, SA_UNSUPPORTED = 1, SA_INVALID = 2, SA_CUDA_ERROR = 3 };

/* Everything that decides support and workspace. No pointers, no device state. */
typedef struct sa_problem {
  int32_t dtype;           /* SA_FLOAT16, SA_BFLOAT16 or SA_FLOAT32, of query, key, value and output */
  int32_t batch;           /* B */
  int32_t heads;           /* Hq, a multiple of kv_heads */
  int32_t kv_heads;        /* Hkv */
  int32_t queries;         /* S, at most keys */
  int32_t keys;            /* T; query row i stands at position T - S + i */
  int32_t head_dim;        /* D of query and key */
  int32_t value_dim;       /* Dv of value and output */
  float scale;             /* finite, > 0 */
  float softcap;           /* 0: none */
  int32_t policy;          /* SA_DENSE .. SA_STRIPE_WINDOW */
  float alpha;             /* (0, 1]: of every head; with values a head, the smallest of them */
  float alpha_slash;       /* column_slash, likewise */
  float max_density;       /* (0, 1]: of the key blocks that a tile may see, at most this share is kept; 1: no budget. column_slash, stripe_window: 1 */
  int32_t stride;          /* residue */
  int32_t sample_rows;     /* tile, column_slash */
  int32_t value_weight;    /* residue, tile: 1 weighs each sampled probability with the L2 norm of its value row, 0 does not */
  int32_t segment;         /* column_slash */
  float sample_ratio;      /* stripe_window */
  float window_ratio;      /* stripe_window */
  int32_t block_q;         /* rows of a query tile */
  int32_t block_k;         /* keys of a key block */
  int32_t window;          /* tokens, always kept behind a tile */
  int32_t sink;            /* tokens, always kept at the first real key */
  int32_t dense_rows;      /* tokens at the end whose tiles keep every block */
  int32_t min_length;      /* T below it: full attention */
  int32_t has_key_mask;    /* 1: the call passes key_mask */
  int32_t has_certificate; /* 1: the call passes certificate */
  int32_t path;            /* SA_PATH_AUTO, or the one to use: a problem that it does not take is refused. AUTO obeys the environment variable
                              SA_EXPORT_KERNEL_PATH (sm90, sm80, generic) */
  int64_t scratch_bytes;   /* target size of block masses and block lists together; 0: 512 MiB. Longer prompts run in chunks of query tiles */
} sa_problem;

/* The answer of supports. */
typedef struct sa_support {
  int32_t code;        /* SA_OK, SA_UNSUPPORTED or SA_INVALID */
  int32_t path;        /* the kernels of attention or decode; SA_PATH_NONE when refused */
  int32_t select_path; /* the kernels of sampling and filtering; SA_PATH_NONE when refused or when nothing is selected */
  int32_t reserved;
  char text[512]; /* refused: why, in one sentence. Taken: what kept a faster path out, or empty */
} sa_support;

/* A 4-D tensor [B, H, rows, D] on the device. Strides are in elements; the last dimension is contiguous. The base is aligned to its element. The paths sm90
 * and sm80 need a base aligned to 16 bytes and strides that are multiples of 16 bytes (8 elements); the generic path does not. */
typedef struct sa_tensor {
  void *data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_s;
} sa_tensor;

/* Which key blocks each query tile reads. Tiles first_tile .. first_tile + tiles - 1 of a call. */
typedef struct sa_block_lists {
  int32_t *counts;    /* [B, Hq, tiles] */
  int32_t *indices;   /* [B, Hq, tiles, capacity], ascending, the first counts[...] of a row are used */
  int32_t first_tile; /* index of the first query tile that is described */
  int32_t tiles;      /* number of tiles that are described */
  int32_t capacity;   /* row length of indices, at least nK */
} sa_block_lists;

/* Device pointers, unless a comment says otherwise. */
typedef struct sa_prefill_params {
  sa_problem problem;
  sa_tensor query;               /* [B, Hq, S, D] */
  sa_tensor key;                 /* [B, Hkv, T, D] */
  sa_tensor value;               /* [B, Hkv, T, Dv] */
  sa_tensor output;              /* [B, Hq, S, Dv] */
  const float *alpha;            /* [Hq], or NULL: problem.alpha for every head */
  const int32_t *bounds;         /* [B, 2]: first real key, one past the last real key, all keys between them real; NULL: 0 and T, or key_mask says */
  float *lse;                    /* [B, Hq, S] contiguous: natural log-sum-exp over the kept keys, -inf for a row with no key; or NULL */
  const float *alpha_slash;      /* [Hq], or NULL: problem.alpha_slash */
  const uint8_t *key_mask;       /* [B, T] contiguous: non-zero = real token, holes allowed; or NULL. Not together with bounds */
  float *certificate;            /* [B, Hq, 2]: min and mean retained probability of the sampled rows; or NULL */
  const float *host_alpha;       /* [Hq] on the HOST, or NULL: as alpha, copied by value when the call is made (also while a graph is captured) */
  const float *host_alpha_slash; /* likewise */
} sa_prefill_params;

/* Decode: S in 1 .. 16 rows against T keys, full attention. alpha is not read. */
typedef sa_prefill_params sa_decode_params;

#ifdef __cplusplus
}
#endif
#endif
