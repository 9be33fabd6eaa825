#include <algorithm>

#include "decode.h"

namespace decdec::cuda {

template <Dtype kDtype>
void launch_attend_dtype(const AttendParams& params, cudaStream_t stream);

AttendGrid attend_grid(int heads, int kv_heads, int head_dim, int64_t places, bool few) {
  if (few) return {heads / kv_heads, 1};
  const int sharing = heads / kv_heads, each = attend_heads(attend_lanes(head_dim), sharing);
  const int groups = (sharing + each - 1) / each;
  const int64_t useful = (places + kMinPlaces - 1) / kMinPlaces;
  const int resident = 2 * current_device().sms / (kv_heads * groups);
  return {groups, int(std::clamp<int64_t>(std::min<int64_t>(useful, resident), 1, kMaxSplits))};
}

void launch_attend(const AttendParams& p, cudaStream_t stream) {
  (p.dtype == Dtype::kHalf ? launch_attend_dtype<Dtype::kHalf> : launch_attend_dtype<Dtype::kBfloat16>)(p, stream);
}

}  // namespace decdec::cuda
