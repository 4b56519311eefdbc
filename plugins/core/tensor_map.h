// Tensor maps for the copy engine, through the driver entry point (nothing links against libcuda).
#pragma once

#include "sample_attention/kernels.h"

#include <cuda.h>

namespace sample_attention {

struct MapShape {
  int dtype, head_dim, heads, batch;
};

// [D, rows, heads, batch] with boxes of one slab x box_rows.
Status encode_rows(CUtensorMap *map, const sa_tensor &tensor, const MapShape &shape, int rows, int box_rows);

// [D, residues, rows, heads, batch]: row r of residue c is row c + stride * r of the tensor. Boxes of one slab x 1 x box_rows.
Status encode_slices(CUtensorMap *map, const sa_tensor &tensor, const MapShape &shape, int stride, int residues, int rows, int box_rows);

}  // namespace sample_attention
