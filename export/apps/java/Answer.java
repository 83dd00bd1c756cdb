import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.LongStream;

/**
 * A qft bundle in Java: onnxruntime, DJL's tokenizers and Gson.
 *
 * <pre>
 * java -jar target/answer.jar bundle "A waste of two hours."   one answer a text: a label, or words that are written
 * java -jar target/answer.jar bundle --check                   does this machine compute what was measured?
 * </pre>
 */
public final class Answer implements AutoCloseable {
  private static final int MOST_NEW_TOKENS = 128;

  private final OrtEnvironment environment = OrtEnvironment.getEnvironment();
  private final JsonObject manifest;
  private final JsonObject feeding;
  private final List<Long> stopIds;
  private final OrtSession session;
  private final HuggingFaceTokenizer tokenizer;

  public static void main(String[] words) throws IOException, OrtException {
    if (words.length < 2) {
      System.err.println("answer BUNDLE --check, or answer BUNDLE and a text");
      System.exit(2);
    }
    try (Answer bundle = new Answer(Path.of(words[0]))) {
      if (words[1].equals("--check")) {
        System.exit(bundle.check() ? 0 : 1);
      }
      for (String text : Arrays.copyOfRange(words, 1, words.length)) {
        System.out.println(bundle.answer(text));
      }
    }
  }

  Answer(Path folder) throws IOException, OrtException {
    manifest = JsonParser.parseString(Files.readString(folder.resolve("qft.json"))).getAsJsonObject();
    feeding = manifest.getAsJsonObject("feeding");
    stopIds = ids(feeding.getAsJsonArray("stop_ids"));
    String task = manifest.get("task").getAsString();
    if (!List.of("text-generation", "text-classification").contains(task) || manifest.get("several_labels").getAsBoolean()) {
      throw new IOException("this program writes text or chooses one label; the bundle's task is " + task);
    }
    session = environment.createSession(folder.resolve(manifest.get("model").getAsString()).toString());
    tokenizer = HuggingFaceTokenizer.newInstance(folder.resolve("tokenizer.json"));
  }

  String answer(String text) throws OrtException {
    String fed = feeding.get("before").getAsString() + text + feeding.get("after").getAsString();
    long[] found = tokenizer.encode(fed, feeding.get("special_tokens").getAsBoolean(), false).getIds();
    List<Long> prompt = LongStream.of(found).boxed().toList();
    if (stopIds.isEmpty()) {
      return decide(logits(shortened(prompt))[0]);
    }
    List<Long> written = generate(prompt, MOST_NEW_TOKENS).stream().filter(id -> !stopIds.contains(id)).toList();
    return tokenizer.decode(written.stream().mapToLong(Long::longValue).toArray()).strip();
  }

  /** What is too long for a classifier loses its end, but not the token that marks it. */
  private List<Long> shortened(List<Long> prompt) {
    int longest = manifest.get("max_length").getAsInt();
    if (prompt.size() <= longest) {
      return prompt;
    }
    return joined(prompt.subList(0, longest - 1), prompt.subList(prompt.size() - 1, prompt.size()));
  }

  /** The likeliest label, with a probability that the temperature makes honest. */
  private String decide(float[] logits) {
    boolean calibrated = manifest.has("calibration") && manifest.get("calibration").isJsonObject();
    double temperature = calibrated ? manifest.getAsJsonObject("calibration").get("temperature").getAsDouble() : 1;
    int best = (int) firstChoice(logits);
    double total = 0;
    for (float value : logits) {
      total += Math.exp((value - logits[best]) / temperature);
    }
    return manifest.getAsJsonArray("labels").get(best).getAsString() + "  " + Math.round(100 / total) + "%";
  }

  /** The greedy answer, with its stop token if one came. */
  List<Long> generate(List<Long> prompt, int most) throws OrtException {
    List<Long> out = new ArrayList<>();
    List<Long> fed = prompt;
    OrtSession.Result last = null;
    while (out.size() < most && (out.isEmpty() || !stopIds.contains(out.get(out.size() - 1)))) {
      OrtSession.Result next = step(fed, last, prompt.size() + out.size() - fed.size());
      if (last != null) {
        last.close();
      }
      last = next;
      float[][] logits = rows(next);
      fed = List.of(firstChoice(logits[logits.length - 1]));
      out.addAll(fed);
    }
    if (last != null) {
      last.close();
    }
    return out;
  }

  /** Logits of every position, or a classifier's one. */
  float[][] logits(List<Long> fed) throws OrtException {
    try (OrtSession.Result found = step(fed, null, 0)) {
      return rows(found);
    }
  }

  /** Feeds ids after the `known` positions whose keys and values the last result holds. */
  private OrtSession.Result step(List<Long> fed, OrtSession.Result last, int known) throws OrtException {
    int count = fed.size();
    Map<String, OnnxTensor> inputs = new HashMap<>();
    List<OnnxTensor> made = new ArrayList<>();
    for (String name : session.getInputNames()) {
      OnnxTensor tensor =
          switch (name) {
            case "input_ids" -> row(fed.stream().mapToLong(Long::longValue));
            case "attention_mask" -> row(LongStream.generate(() -> 1).limit(known + count));
            case "position_ids" -> row(LongStream.range(known, known + count));
            case "token_type_ids" -> row(LongStream.generate(() -> 0).limit(count));
            default -> last == null ? nothing(name) : null;
          };
      if (tensor == null) {
        inputs.put(name, (OnnxTensor) last.get(name.replace("past_key_values", "present")).orElseThrow());
      } else {
        inputs.put(name, tensor);
        made.add(tensor);
      }
    }
    try {
      return session.run(inputs);
    } finally {
      made.forEach(OnnxTensor::close);
    }
  }

  private OnnxTensor row(LongStream numbers) throws OrtException {
    return OnnxTensor.createTensor(environment, new long[][] {numbers.toArray()});
  }

  /** An empty cache for one row: (1, heads, 0, head size). */
  private OnnxTensor nothing(String name) throws OrtException {
    long[] shape = ((TensorInfo) session.getInputInfo().get(name).getInfo()).getShape();
    return OnnxTensor.createTensor(environment, FloatBuffer.allocate(0), new long[] {1, shape[1], 0, shape[3]});
  }

  private static float[][] rows(OrtSession.Result found) throws OrtException {
    Object value = found.get("logits").orElseThrow().getValue();
    return value instanceof float[][][] positions ? positions[0] : (float[][]) value;
  }

  private static long firstChoice(float[] logits) {
    int best = 0;
    for (int place = 1; place < logits.length; place++) {
      best = logits[place] > logits[best] ? place : best;
    }
    return best;
  }

  /** Golden cases: the first choice at every position, and whole answers where no choice was close. */
  boolean check() throws OrtException {
    int positions = 0;
    int same = 0;
    int clear = 0;
    int wrong = 0;
    for (JsonElement element : manifest.getAsJsonArray("golden")) {
      JsonObject golden = element.getAsJsonObject();
      List<Long> prompt = ids(golden.getAsJsonArray("prompt"));
      List<Long> answer = ids(golden.getAsJsonArray("answer"));
      boolean writes = !stopIds.isEmpty();
      float[][] logits = logits(writes ? joined(prompt, answer.subList(0, answer.size() - 1)) : prompt);
      List<Long> chosen = new ArrayList<>();
      for (int place = 0; place < answer.size(); place++) {
        chosen.add(firstChoice(logits[logits.length - answer.size() + place]));
        JsonArray best = golden.getAsJsonArray("top_logits").get(place).getAsJsonArray();
        long expected = golden.getAsJsonArray("top_ids").get(place).getAsJsonArray().get(0).getAsLong();
        boolean equal = chosen.get(place) == expected;
        positions++;
        same += equal ? 1 : 0;
        clear += !equal && best.get(0).getAsDouble() - best.get(1).getAsDouble() > 0.5 ? 1 : 0;
      }
      if (golden.get("free_running").getAsBoolean()) {
        wrong += (writes ? generate(prompt, answer.size()) : chosen).equals(answer) ? 0 : 1;
      }
    }
    boolean agrees = same >= 0.98 * positions && clear == 0 && wrong == 0;
    System.out.printf(
        "{\"positions\": %d, \"same\": %d, \"clearDifferences\": %d, \"freeDifferences\": %d, \"agrees\": %b}%n",
        positions, same, clear, wrong, agrees);
    return agrees;
  }

  private static List<Long> ids(JsonArray numbers) {
    List<Long> found = new ArrayList<>();
    numbers.forEach(number -> found.add(number.getAsLong()));
    return found;
  }

  private static List<Long> joined(List<Long> first, List<Long> second) {
    List<Long> all = new ArrayList<>(first);
    all.addAll(second);
    return all;
  }

  @Override
  public void close() throws OrtException {
    session.close();
    tokenizer.close();
  }
}
