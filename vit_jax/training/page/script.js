"use strict";

const find = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const MOST_BYTES = 10 * 2 ** 20;
let asked = 0; // the last picture asked about: slower answers to earlier ones are not shown

function say(words, isError) {
  find("message").textContent = words;
  find("message").className = isError ? "error" : "";
  find("message").hidden = false;
  find("answer").hidden = true;
}

async function predict(file, source) {
  const number = ++asked;
  if (file.size > MOST_BYTES) {
    say("This file is larger than 10 MB: give a smaller one.", true);
    return;
  }
  say("Looking …", false);
  let answer;
  try {
    const response = await fetch("predict", { method: "POST", body: file });
    answer = response.status === 500 ? { error: "The server failed: see its terminal." } : await response.json();
  } catch {
    answer = { error: "The server did not answer: is it still running?" };
  }
  if (number !== asked) return;
  if (answer.error) say(answer.error, true);
  else show(answer, source);
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function show(answer, source) {
  find("source").textContent = source;
  find("picture").src = answer.picture;
  find("attention").src = answer.attention;
  find("classes").replaceChildren(
    ...answer.predictions.map(({ label, probability }) => {
      const words = document.createElement("div");
      words.append(element("span", "label", label), element("span", "probability", percent(probability)));
      const bar = element("span", "bar", "");
      bar.append(element("span", "", ""));
      bar.firstChild.style.width = `${100 * probability}%`;
      const line = document.createElement("li");
      line.append(words, bar);
      return line;
    }),
  );
  find("message").hidden = true;
  find("answer").hidden = false;
  find("result").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

function sample(label, number) {
  const image = document.createElement("img");
  image.src = `samples/${number}`;
  image.alt = "";
  const button = document.createElement("button");
  button.type = "button";
  button.append(image, element("span", "", label));
  button.addEventListener("click", async () => {
    predict(await (await fetch(image.src)).blob(), `a test picture of the class ${label}`);
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

async function start() {
  const run = await (await fetch("run")).json();
  find("name").textContent = document.title = run.name;
  const facts = [`${run.classes} classes`, run.weights];
  if (run.accuracy !== null) facts.push(`the run's test accuracy: ${percent(run.accuracy)}`);
  find("about").textContent = facts.join(" · ");
  find("samples").replaceChildren(...run.samples.map(sample));
  find("tests").hidden = !run.samples.length;
  for (const name of run.pictures) {
    find(name).querySelector("img").src = `${name}.png`;
    find(name).hidden = false;
  }
  find("run").hidden = !run.pictures.length;
}

find("file").addEventListener("change", (event) => {
  for (const file of event.target.files) predict(file, file.name);
  event.target.value = ""; // the same file may be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // else the browser would open the file
    find("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") for (const file of event.dataTransfer.files) predict(file, file.name);
  });
}
start();
