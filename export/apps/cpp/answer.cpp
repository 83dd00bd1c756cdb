// A qft bundle in C++: onnxruntime and nlohmann/json. Token ids in, the answer's token ids or a label out.
//
//   answer BUNDLE 2 27832 236787 …     the greedy answer to a prompt's token ids, or the label of a text's
//   answer BUNDLE --check              does this machine compute what was measured? (qft.json's golden cases)
//
// Ids come from tokenizer.json, which mlc-ai/tokenizers-cpp or onnxruntime-extensions read: those of
// feeding.before + text + feeding.after, with special tokens added if feeding.special_tokens says so.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Ids = std::vector<int64_t>;
using json = nlohmann::json;

// float32 (positions, width)
struct Logits {
  std::vector<float> values;
  size_t width;

  int64_t first_choice(size_t position) const {
    auto begin = values.begin() + position * width;
    return std::max_element(begin, begin + width) - begin;
  }
  size_t positions() const { return values.size() / width; }
};

class Bundle {
 public:
  explicit Bundle(const fs::path& folder)
      : manifest(json::parse(std::ifstream(folder / "qft.json"))),
        session_(env_, (folder / manifest["model"].get<std::string>()).c_str(), Ort::SessionOptions{}) {
    for (size_t i = 0; i < session_.GetInputCount(); ++i)
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator_).get());
    for (const std::string& name : inputs_)
      if (name.rfind("past_key_values.", 0) == 0) present_.push_back("present." + name.substr(16));
    stop_ids = manifest["feeding"]["stop_ids"].get<Ids>();
  }

  // The greedy answer, with its stop token if one came.
  Ids generate(const Ids& prompt, size_t most) {
    past_.clear();
    Ids out, fed = prompt;
    while (out.size() < most && (out.empty() || !stops(out.back()))) {
      Logits logits = step(fed);
      fed = {logits.first_choice(logits.positions() - 1)};
      out.push_back(fed.front());
    }
    return out;
  }

  // Logits of every position of ids, or a classifier's one.
  Logits logits(const Ids& ids) {
    past_.clear();
    return step(ids);
  }

  bool stops(int64_t id) const { return std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end(); }
  bool writes() const { return !stop_ids.empty(); }

  json manifest;
  Ids stop_ids;

 private:
  // Feeds ids after what the cache holds, and keeps the grown cache.
  Logits step(const Ids& ids) {
    const int64_t known = past_.empty() ? 0 : past_.front().GetTensorTypeAndShapeInfo().GetShape()[2];
    const int64_t count = static_cast<int64_t>(ids.size());
    Ids mask(known + count, 1), positions(count), zeros(count, 0), tokens = ids;
    for (int64_t i = 0; i < count; ++i) positions[i] = known + i;

    std::vector<Ort::Value> fed;
    std::vector<const char*> input_names, output_names;
    size_t next = 0;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const std::string& name = inputs_[i];
      input_names.push_back(name.c_str());
      if (name == "input_ids") fed.push_back(row(tokens));
      else if (name == "attention_mask") fed.push_back(row(mask));
      else if (name == "position_ids") fed.push_back(row(positions));
      else if (name == "token_type_ids") fed.push_back(row(zeros));
      else fed.push_back(past_.empty() ? nothing(i) : std::move(past_[next++]));
    }
    output_names.push_back("logits");
    for (const std::string& name : present_) output_names.push_back(name.c_str());

    auto found = session_.Run(Ort::RunOptions{nullptr}, input_names.data(), fed.data(), fed.size(), output_names.data(), output_names.size());
    auto shape = found[0].GetTensorTypeAndShapeInfo().GetShape();
    const float* data = found[0].GetTensorData<float>();
    const size_t total = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    Logits logits{{data, data + total}, static_cast<size_t>(shape.back())};
    past_.clear();
    std::move(found.begin() + 1, found.end(), std::back_inserter(past_));
    return logits;
  }

  Ort::Value row(Ids& ids) {
    const int64_t shape[] = {1, static_cast<int64_t>(ids.size())};
    return Ort::Value::CreateTensor<int64_t>(memory_, ids.data(), ids.size(), shape, 2);
  }

  // An empty cache for one row: (1, heads, 0, head size).
  Ort::Value nothing(size_t input) {
    auto info = session_.GetInputTypeInfo(input);
    auto shape = info.GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1, shape[2] = 0;
    return Ort::Value::CreateTensor<float>(allocator_, shape.data(), shape.size());
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR, "qft"};
  Ort::Session session_;
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, present_;  // present_: what becomes the past, in the order of the inputs
  std::vector<Ort::Value> past_;
};

// The likeliest label, with a probability that the temperature makes honest.
std::pair<std::string, double> decide(const Bundle& bundle, const Logits& logits) {
  const json& how = bundle.manifest.value("calibration", json());
  const double temperature = how.is_object() ? how["temperature"].get<double>() : 1.0;
  const int64_t best = logits.first_choice(0);
  double total = 0;
  for (float value : logits.values) total += std::exp((value - logits.values[best]) / temperature);
  return {bundle.manifest["labels"][best], 1 / total};
}

// Golden cases: the first choice at every position, and whole answers where no choice was close.
bool check(Bundle& bundle) {
  size_t positions = 0, same = 0, clear = 0, wrong = 0;
  for (const json& golden : bundle.manifest["golden"]) {
    const Ids prompt = golden["prompt"], answer = golden["answer"];
    Ids fed = prompt;
    if (bundle.writes()) fed.insert(fed.end(), answer.begin(), answer.end() - 1);
    const Logits logits = bundle.logits(fed);
    Ids chosen;
    for (size_t i = 0; i < answer.size(); ++i) {
      chosen.push_back(logits.first_choice(logits.positions() - answer.size() + i));
      const bool equal = chosen.back() == golden["top_ids"][i][0].get<int64_t>();
      const double margin = golden["top_logits"][i][0].get<double>() - golden["top_logits"][i][1].get<double>();
      ++positions, same += equal, clear += !equal && margin > 0.5;
    }
    if (golden["free_running"]) wrong += (bundle.writes() ? bundle.generate(prompt, answer.size()) : chosen) != answer;
  }
  const bool agrees = same >= 0.98 * positions && clear == 0 && wrong == 0;
  std::cout << json{{"positions", positions}, {"agreement", double(same) / positions}, {"clearDifferences", clear},
                    {"freeDifferences", wrong}, {"agrees", agrees}} << "\n";
  return agrees;
}

int main(int count, char** words) try {
  if (count < 3) {
    std::cerr << "answer BUNDLE --check, or answer BUNDLE followed by a prompt's token ids\n";
    return 2;
  }
  Bundle bundle(words[1]);
  const std::string task = bundle.manifest["task"];
  if ((task != "text-generation" && task != "text-classification") || bundle.manifest["several_labels"]) {
    std::cerr << "this program writes text or chooses one label; the bundle's task is " << task << "\n";
    return 2;
  }
  if (std::string(words[2]) == "--check") return check(bundle) ? 0 : 1;
  Ids ids;
  for (int i = 2; i < count; ++i) ids.push_back(std::stoll(words[i]));
  if (bundle.writes()) {
    for (int64_t id : bundle.generate(ids, 128)) std::cout << id << " ";
    std::cout << "\n";
  } else {
    auto [label, probability] = decide(bundle, bundle.logits(ids));
    std::cout << label << "  " << std::lround(100 * probability) << "%\n";
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
