"use strict";
const $ = (id) => document.getElementById(id);
const parts = ["comparison", "finished", "results"];
const voteButtons = [...document.querySelectorAll("[data-choice]")];
let state = null;
let busy = true; // a vote is on its way, or the pictures of a pair

async function ask(name, content) {
  const request = content && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  };
  let answer;
  try {
    answer = await fetch(name, request);
  } catch {
    throw new Error("There is no answer: has the command in the terminal ended? Votes up to here are kept.");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? "This page is out of date. Load it again.");
  return found;
}

async function act(name, content) {
  if (busy) return;
  setBusy(true);
  try {
    await show(await ask(name, content));
    $("problem").hidden = true;
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
    setBusy(false);
  }
  for (const button of voteButtons) button.classList.remove("chosen");
}

function setBusy(now) {
  busy = now;
  // Disabled buttons would lose the focus.
  for (const button of voteButtons) button.setAttribute("aria-disabled", now);
  $("undo").disabled = $("stop").disabled = now || !state?.done;
}

function loaded(image, name) {
  return new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = () => reject(new Error("A picture cannot be loaded. Load the page again."));
    image.src = `picture/${name}`;
  });
}

async function show(next) {
  state = next;
  const { pair, done, total, results } = state;
  const part = results ? "results" : pair ? "comparison" : "finished";
  for (const each of parts) $(each).hidden = each !== part;
  $("progress").max = Math.max(total, 1);
  $("progress").value = done;
  $("count").textContent = `${done} of ${total}`;
  $("stop").hidden = part !== "comparison";
  $("undo").hidden = part === "results";
  if (pair) await showPair(pair);
  if (results) showResults(results);
  if (!pair) {
    const title = $(part).querySelector("h1");
    $("status").textContent = title.textContent;
    title.focus();
  }
  setBusy(false);
  for (const name of state.ahead) new Image().src = `picture/${name}`;
}

async function showPair(pair) {
  $("pair").classList.add("loading");
  $("prompt").textContent = pair.prompt || "no prompt";
  $("comparison").classList.toggle("alone", !pair.references.length);
  $("references-part").hidden = !pair.references.length;
  $("references").replaceChildren(
    ...pair.references.map((name, number) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.className = "zoom";
      image.alt = `Reference ${number + 1}`;
      image.onerror = () => item.remove();
      image.src = `picture/${name}`;
      button.append(image);
      item.append(button);
      return item;
    }),
  );
  await Promise.all([loaded($("left"), pair.left), loaded($("right"), pair.right)]);
  $("pair").classList.remove("loading");
  $("status").textContent = `Pair ${state.done + 1} of ${state.total}: ${pair.prompt}`;
}

function showResults(results) {
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const names = document.querySelectorAll("thead th");
  $("no-votes").hidden = results.length > 0;
  $("rows").replaceChildren(
    ...results.map((each) => {
      const row = document.createElement("tr");
      const texts = [
        each.label_a, each.label_b, percent(each.rate),
        `${(100 * each.low).toFixed(1)}–${percent(each.high)}`,
        each.wins_a, each.wins_b, each.ties, each.groups,
      ];
      texts.forEach((text, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (column) cell.dataset.name = names[column].textContent;
        else cell.scope = "row";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    }),
  );
}

function vote(choice) {
  if (busy || !state?.pair) return;
  voteButtons.find((button) => button.dataset.choice === String(choice)).classList.add("chosen");
  act("vote", { pair: state.pair.id, choice });
}

function undo() {
  if (!$("undo").disabled && !$("undo").hidden) act("undo", {});
}

for (const button of voteButtons) {
  button.addEventListener("click", () => vote(Number(button.dataset.choice)));
}
$("undo").addEventListener("click", undo);
$("show").addEventListener("click", () => act("end", {}));
$("stop").addEventListener("click", () => {
  $("sure-count").textContent =
    `${state.done} of ${state.total} pairs have a vote. The results show which methods were ` +
    "compared. The same command goes on with the rest later.";
  $("sure").showModal();
});
$("sure").addEventListener("close", () => {
  if ($("sure").returnValue === "end") act("end", {});
  $("sure").returnValue = "";
});
document.addEventListener("click", ({ target }) => {
  const image = target.closest(".zoom")?.querySelector("img");
  if (!image) return;
  $("large").src = image.src;
  $("large").alt = image.alt;
  $("enlarged").showModal();
});
$("enlarged").addEventListener("click", () => $("enlarged").close());
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  if (["0", "1", "2"].includes(event.key)) vote(Number(event.key));
  else if (event.key.toLowerCase() === "u") undo();
});

busy = false;
act("state");
