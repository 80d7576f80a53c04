// Run by node with npm openai@3.3.0: files, a fine-tune, completions; prints what the test checks, as JSON.
const fs = require("fs");
const { Configuration, OpenAIApi } = require("openai");

const [model, trainingFile] = process.argv.slice(2);
const api = new OpenAIApi(
  new Configuration({ basePath: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY }),
);

async function main() {
  const asked = { model, prompt: "The plot was dull.\n\n###\n\n", max_tokens: 2, temperature: 0 };
  const plain = (await api.createCompletion({ ...asked, logprobs: 2 })).data;
  const stream = (await api.createCompletion({ ...asked, stream: true }, { responseType: "stream" })).data;
  let streamed = "";
  let done = false;
  let text = "";
  for await (const piece of stream) text += piece.toString();
  for (const line of text.split("\n").filter((line) => line.startsWith("data: "))) {
    const data = line.slice("data: ".length);
    if (data === "[DONE]") done = true;
    else streamed += JSON.parse(data).choices[0].text;
  }
  const said = { model, messages: [{ role: "user", content: "Hello" }], max_tokens: 2, temperature: 0 };
  const chat = (await api.createChatCompletion(said)).data;
  const file = (await api.createFile(fs.createReadStream(trainingFile), "fine-tune")).data;
  const job = (await api.createFineTune({ training_file: file.id, model: "ada", n_epochs: 50 })).data;
  const cancelled = (await api.cancelFineTune(job.id)).data;
  const events = (await api.listFineTuneEvents(job.id)).data;
  const wrong = await api.retrieveModel("no-such-model").catch((error) => error.response);
  console.log(
    JSON.stringify({
      plain: plain.choices[0].text,
      streamed,
      done,
      chat: [chat.object, chat.choices[0].message.role, typeof chat.choices[0].message.content],
      file: [file.filename, file.purpose],
      cancelled: cancelled.status,
      lastEvent: events.data[events.data.length - 1].message,
      listed: (await api.listModels()).data.data.some((listed) => listed.id === model),
      retrieved: (await api.retrieveModel(model)).data.id,
      wrongModel: [wrong.status, wrong.data.error.code],
    }),
  );
}

main();
