// Choosing the next token out of logits, as edgeexport/session/generate.py does it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgeexport {

// Temperature 0 is greedy: the largest logit, ties to the lowest id.
struct Sampling {
  double temperature = 0.0;
  double topP = 1.0;
  std::size_t topK = 0;            // 0: all
  float repetitionPenalty = 1.0F;  // divides positive and multiplies negative logits of all tokens seen; 1: none
  float frequencyPenalty = 0.0F;   // subtracted once for each occurrence in the answer; 0: none
  std::uint64_t seed = 0;
};

// numpy's Generator(PCG64(seed)).random(), to the bit. Source: numpy 2.4, bit_generator.pyx (SeedSequence) and pcg64.h;
// M. O'Neill, PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms, HMC-CS-2014-0905.
class Pcg64 {
 public:
  explicit Pcg64(std::uint64_t seed);

  // From 0 to below 1.
  double unit();

 private:
  struct Wide {
    std::uint64_t high = 0;
    std::uint64_t low = 0;
  };
  static Wide product(const Wide& a, const Wide& b);
  static Wide sum(const Wide& a, const Wide& b);
  void step();

  Wide state_;
  Wide increment_;
};

// Chooses the tokens of one answer. Memory is taken when it is made; choosing takes none.
//
// Greedy choices and penalties are Python's to the bit. With a temperature, the random numbers are too, and so are the
// tokens, unless exp() of the two sides, which may differ in a probability's last bit, puts one of them on the other
// side of the random number: some 1e-16 of all tokens.
class Chooser {
 public:
  // `prompt` are the ids that the repetition penalty knows at the start. Throws bad-sampling, bad-token.
  Chooser(const Sampling& sampling, std::size_t vocab, const std::vector<std::int32_t>& prompt);

  // The next token for logits [vocab]; `position` is for messages. Throws nonfinite-logits.
  std::int32_t choose(const float* logits, std::size_t position);

 private:
  std::size_t drawn(const float* logits);

  Sampling sampling_;
  std::size_t vocab_;
  bool penalised_;
  std::vector<bool> seen_;
  std::vector<float> counts_;  // in the answer
  std::vector<float> changed_;  // logits after the penalties
  std::vector<std::uint32_t> order_;
  std::vector<double> weights_;
  Pcg64 random_;
};

}  // namespace edgeexport
