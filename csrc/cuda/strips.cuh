// Strips: 16 rows of a tile that a warp has for its own in shared memory, in rows of 128 bytes, 64 columns a block,
// 16-byte pieces exchanged as products of a warpgroup want them (hopper.cuh). They come and go a row at a time, and are
// read and written in blocks of eight by eight, as a thread has sums of a product.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "cuda/hopper.cuh"
#endif

namespace fastmtl::cuda {

constexpr int kStripRows = 16, kStripBlock = kStripRows * 128;

// Pieces of 16 bytes of a strip of COLUMNS columns that a lane moves: kMoves of them, one every kTogether rows.
template <int COLUMNS>
struct StripPieces {
  static constexpr int kOfRow = COLUMNS / 8, kTogether = 32 / kOfRow, kMoves = kStripRows / kTogether;

  __device__ __forceinline__ static int column() { return 8 * (static_cast<int>(threadIdx.x) % kOfRow); }
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) % 32 / kOfRow; }
  // Where the i-th one lies in the strip: what does not depend on i is the lane's, once.
  __device__ __forceinline__ static uint32_t place(int i) {
    const uint32_t piece = threadIdx.x % kOfRow, first = threadIdx.x % 32 / kOfRow;
    const uint32_t swizzled = ((piece % 8) ^ first) * 16;
    return piece / 8 * kStripBlock + first * 128 + i * kTogether * 128 + (swizzled ^ (i * kTogether % 8 * 16));
  }
};

// A lane's rows of a matrix in memory, tile by tile.
struct StripRows {
  const char* at;  // the piece of the lane's first row of the tile
  int step;        // bytes to its next one
  int left;        // rows from it on; not positive where there is none, or no such column

  template <int COLUMNS>
  __device__ __forceinline__ static StripRows of(const char* first, int64_t pitch, int row, int n_rows, int n_columns) {
    using Pieces = StripPieces<COLUMNS>;
    const int mine = row + Pieces::row();
    return {first + 2 * (mine * pitch + Pieces::column()), 2 * Pieces::kTogether * static_cast<int>(pitch),
            Pieces::column() < n_columns ? n_rows - mine : 0};
  }
  __device__ __forceinline__ void next(int rows, int64_t pitch) {
    at += 2 * rows * pitch;
    left -= rows;
  }
};

// Queues a strip; what is not there is zero.
template <int COLUMNS>
__device__ __forceinline__ void bring_strip(uint32_t strip, const StripRows& rows) {
  using Pieces = StripPieces<COLUMNS>;
#pragma unroll
  for (int i = 0; i < Pieces::kMoves; ++i) {
    const bool there = i * Pieces::kTogether < rows.left;
    copy_16(strip + Pieces::place(i), rows.at + static_cast<int64_t>(i) * rows.step, there ? 16 : 0);
  }
}

// Writes a strip to memory; what is not there stays.
template <int COLUMNS>
__device__ __forceinline__ void leave_strip(uint32_t strip, const StripRows& rows) {
  using Pieces = StripPieces<COLUMNS>;
#pragma unroll
  for (int i = 0; i < Pieces::kMoves; ++i) {
    const uint4 found = load_shared(strip + Pieces::place(i));
    if (i * Pieces::kTogether < rows.left)
      *reinterpret_cast<uint4*>(const_cast<char*>(rows.at) + static_cast<int64_t>(i) * rows.step) = found;
  }
}

// The address that this lane names for blocks of eight by eight of columns 16 jj to 16 jj + 15: rows 0 and 8, then
// those of the next eight columns.
__device__ __forceinline__ uint32_t strip_blocks(int jj) {
  const uint32_t lane = threadIdx.x % 32, swizzled = (lane / 16 ^ lane % 8) * 16;
  return jj / 4 * kStripBlock + (lane / 8 % 2 * 8 + lane % 8) * 128 + (swizzled ^ (jj % 4 * 32));
}

// A tile of 64 rows of up to 128 columns that 256 threads bring together, tile by tile; in two blocks of 64 columns.
struct TileRows {
  static constexpr int kRows = 64, kColumns = 128, kBlock = kRows * 128, kBytes = kColumns / 64 * kBlock;

  uint32_t place;  // of the thread's first piece in a tile
  const char* at;
  int step, left;

  // Of `columns` of a matrix of n_rows rows that begins at `first`.
  __device__ __forceinline__ TileRows(const char* first, int64_t pitch, int n_rows, int columns) {
    const int piece = threadIdx.x % 16, row = threadIdx.x / 16;  // 16 bytes of a row of 256
    place = piece / 8 * kBlock + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
    at = first + 2 * (row * pitch + 8 * piece);
    step = 32 * static_cast<int>(pitch);
    left = 8 * piece < columns ? n_rows - row : 0;
  }
  // Queues the next tile; rows and columns that are not there are zero.
  __device__ __forceinline__ void bring(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      copy_16(tile + place + i * 2048, at + static_cast<int64_t>(i) * step, 16 * i < left ? 16 : 0);
    }
    at += static_cast<int64_t>(kRows / 16) * step;
    left -= kRows;
  }
};

}  // namespace fastmtl::cuda
