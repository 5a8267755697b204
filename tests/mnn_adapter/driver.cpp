// android_runtime/mnn behind C functions, for the tests.
#include <cstring>
#include <memory>
#include <string>

#include "mnn_engine.h"

namespace {

std::string said;
std::unique_ptr<edgeexport::Bundle> bundle;
std::unique_ptr<edgeexport::DecoderEngine> decoder;

template <typename Work>
int attempt(Work work) {
  try {
    return work();
  } catch (const std::exception& problem) {
    said = problem.what();
    return -1;
  }
}

}  // namespace

extern "C" {

const char* failure() { return said.c_str(); }

// The number of logits.
int open_decoder(const char* folder) {
  return attempt([&] {
    bundle = std::make_unique<edgeexport::Bundle>(edgeexport::Bundle::open(folder));
    edgeexport::RuntimeOptions options;
    options.threads = 1;
    decoder = edgeexport::openMnnDecoder(*bundle, bundle->component("decoder"), options);
    return static_cast<int>(decoder->vocab());
  });
}

void close_decoder() {
  decoder.reset();
  bundle.reset();
}

int step(const std::int32_t* ids, const float* embeddings, const std::int64_t* rope, int count, int position,
         float* logits) {
  return attempt([&] {
    edgeexport::Piece piece;
    piece.count = static_cast<std::size_t>(count);
    piece.tokens = ids;
    piece.embeddings = embeddings;
    piece.rope = rope;
    piece.ropeStride = piece.count;
    const float* made = decoder->step(piece, static_cast<std::size_t>(position));
    std::memcpy(logits, made, decoder->vocab() * sizeof(float));
    return 0;
  });
}

// `count` is how many numbers there is room for in `out`.
int run_graph(const char* name, const char* variant, const char* input, int whole, const std::int64_t* shape, int rank,
              void* data, float* out, int count) {
  return attempt([&] {
    using edgeexport::TensorView;
    const auto graph = edgeexport::openMnnGraph(*bundle, bundle->component(name), variant, {});
    TensorView given;
    given.name = input;
    given.type = whole ? TensorView::Type::kInt64 : TensorView::Type::kFloat32;
    given.shape.assign(shape, shape + rank);
    given.data = data;
    TensorView made;
    made.shape = {count};
    made.data = out;
    graph->run({given}, made);
    return 0;
  });
}
}
