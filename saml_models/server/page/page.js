import { record, tooLong, withheld } from "./microphone.js";
import { PROMPTS } from "./prompts.js";

const ENOUGH = 5; // clips, of which every fifth is held back
const RUNNING = ["queued", "learning"];
const UNUSED = "What was learnt did not help with clips it had not heard, so it is not used: more clips may.";
const NOBODY = "";
const by = (id) => document.getElementById(id);
const state = { model: "", voices: [], recorder: null, again: null, own: "", events: null };

// What is remembered: the voice and the prompt in this browser, the token in this tab alone.
const remembered = {
  get voice() { return localStorage.getItem("saml.voice") ?? NOBODY; },
  set voice(name) { localStorage.setItem("saml.voice", name); },
  get prompt() { return Number(localStorage.getItem("saml.prompt")) || 0; },
  set prompt(number) { localStorage.setItem("saml.prompt", number); },
  get token() { return sessionStorage.getItem("saml.token") ?? ""; },
  set token(token) { sessionStorage.setItem("saml.token", token); },
};

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (remembered.token) headers.Authorization = `Bearer ${remembered.token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    by("door").hidden = false;
    by("inside").hidden = true;
    by("token").focus();
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
  }
  return answer;
}

const voicePath = (name, rest = "") => `v1/speakers/${encodeURIComponent(name)}${rest}`;
const form = (fields) => Object.entries(fields).reduce((data, [key, value]) => (data.append(key, value), data), new FormData());
const say = (text) => { by("status").textContent = text; by("alarm").textContent = ""; };
const warn = (error) => { by("alarm").textContent = error.message ?? error; by("status").textContent = ""; };
const on = (id, event, act) => by(id).addEventListener(event, async (happening) => {
  happening.preventDefault();
  try { await act(happening); } catch (error) { warn(error); }
});
const current = () => state.voices.find((voice) => voice.name === remembered.voice);
const phrase = () => state.again?.text ?? (state.own || PROMPTS[remembered.prompt % PROMPTS.length]);

async function load() {
  const models = await (await call("v1/models")).json();
  state.model = models.data[0].id;
  by("model").textContent = `Model: ${state.model}`;
  by("door").hidden = true;
  by("inside").hidden = false;
  await refresh();
}

async function refresh() {
  state.voices = (await (await call("v1/speakers")).json()).data;
  if (!current()) remembered.voice = NOBODY;
  show();
}

function options(select, names, chosen, nobody) {
  select.replaceChildren(...[NOBODY, ...names].map((name) => new Option(name || nobody, name, false, name === chosen)));
}

function show() {
  const voice = current();
  options(by("voice"), state.voices.map((v) => v.name), remembered.voice, "Choose, or create one below");
  const heardAs = by("heard-as");
  const before = heardAs.options.length ? heardAs.value : remembered.voice;
  const enrolled = state.voices.filter((v) => v.enrolled).map((v) => v.name);
  options(heardAs, enrolled, enrolled.includes(before) ? before : NOBODY, "Nobody in particular");
  if (!state.voices.length) by("new").open = true;
  for (const id of ["delete", "teach"]) by(id).hidden = !voice;
  by("export").hidden = !voice?.enrolled;
  const status = voice?.status ?? {};
  const running = RUNNING.includes(status.state);
  by("progress-section").hidden = !running;
  by("result").hidden = !(voice?.enrolled && status.held?.length);
  if (!voice) return;
  showPrompt();
  showClips(voice, running);
  if (status.held?.length) showResult(status);
  if (status.state === "failed") warn(`It could not be learnt: ${status.error}`);
  if (running) follow(voice.name);
}

function showPrompt() {
  by("prompt").textContent = phrase();
  const reason = withheld();
  by("no-microphone").hidden = !reason;
  by("no-microphone").textContent = reason;
  for (const id of ["record", "dictate"]) by(id).disabled = Boolean(reason);
}

function button(text, label, act, busy) {
  const made = document.createElement("button");
  made.textContent = text;
  made.disabled = busy;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => act().catch(warn));
  return made;
}

function showClips(voice, running) {
  by("clips").replaceChildren(...voice.clips.map((clip) => {
    const item = document.createElement("li");
    const row = document.createElement("div");
    const text = document.createElement("span");
    row.className = "row";
    text.textContent = clip.text;
    row.append(
      text,
      button("Play", `Play: ${clip.text}`, () => play(voice.name, clip.id), false),
      button("Again", `Record again: ${clip.text}`, async () => {
        state.again = clip;
        showPrompt();
        by("record").focus();
      }, running),
      button("Delete", `Delete: ${clip.text}`, async () => {
        await call(voicePath(voice.name, `/clips/${clip.id}`), { method: "DELETE" });
        await refresh();
        say("The clip is deleted.");
      }, running),
    );
    item.append(row);
    return item;
  }));
  const left = ENOUGH - voice.clips.length;
  by("how-many").textContent = left > 0
    ? `${left} more before it can learn; twenty or more are better.`
    : `${voice.clips.length} clips; more are better. Every fifth is kept to compare before and after.`;
  by("learn").disabled = left > 0 || running;
  by("record").disabled = by("record").disabled || running;
}

function showResult(status) {
  const rates = `Word error rate: ${status.wer_before} % before, ${status.wer_after} % after.`;
  by("rates").textContent = status.adapted === false ? `${rates} ${UNUSED}` : rates;
  by("held").tBodies[0].replaceChildren(...status.held.map((clip) => {
    const row = document.createElement("tr");
    for (const text of [clip.text, clip.before, clip.after]) row.insertCell().textContent = text;
    return row;
  }));
}

async function play(name, id) {
  const blob = await (await call(voicePath(name, `/clips/${id}`))).blob();
  const audio = new Audio(URL.createObjectURL(blob));
  audio.addEventListener("ended", () => URL.revokeObjectURL(audio.src));
  await audio.play();
}

// Server-sent events by fetch: EventSource cannot send a token.
async function follow(name) {
  if (state.events === name) return;
  state.events = name;
  try {
    const answer = await call(voicePath(name, "/events"));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const { state: now, step, steps } = JSON.parse(event.replace(/^data: /, ""));
        if (!RUNNING.includes(now)) continue; // its end, which the voice's status tells
        const bar = by("progress");
        if (steps) { bar.max = steps; bar.value = step; } else bar.removeAttribute("value");
        const where = steps ? `Step ${step} of ${steps}` : "The model is being loaded";
        by("progress-text").textContent = now === "queued" ? "Waiting for its turn" : where;
      }
    }
  } finally {
    state.events = null;
  }
  await refresh();
  if (current()?.name === name && current().status.state === "learnt") {
    by("heard-as").value = name;
    say(current().status.adapted === false ? UNUSED : `${name} is learnt.`);
    if (!by("result").hidden) by("result-title").focus();
  }
}

async function toggle(id, level, clock, done) {
  const key = by(id);
  if (state.recorder) {
    const recorder = state.recorder;
    if (recorder.id !== id) throw new Error("Stop the other recording first.");
    state.recorder = null;
    key.disabled = true;
    try {
      const clip = await recorder.stop();
      await done(clip);
    } finally {
      key.disabled = false;
      key.setAttribute("aria-pressed", "false");
      key.textContent = "Record";
      by(clock).textContent = "";
    }
    return;
  }
  const recorder = await record((peak, seconds) => {
    by(level).value = peak;
    by(clock).textContent = `${seconds.toFixed(1)} s`;
  });
  state.recorder = { id, stop: recorder.stop };
  key.setAttribute("aria-pressed", "true");
  key.textContent = "Stop";
}

function next() {
  if (!state.again && !state.own) remembered.prompt = (remembered.prompt + 1) % PROMPTS.length;
  state.again = null;
  state.own = "";
  by("own").value = "";
  showPrompt();
}

async function keep({ seconds, wav }) {
  if (tooLong(seconds)) throw new Error("A clip is 30 seconds at most: record it again, in parts.");
  const where = voicePath(remembered.voice, state.again ? `/clips/${state.again.id}` : "/clips");
  const body = form({ text: phrase(), file: wav });
  await call(where, { method: state.again ? "PUT" : "POST", body });
  next();
  await refresh();
  say(`Recorded. Next: ${phrase()}`);
}

async function transcribe(file) {
  say("Listening.");
  by("text").value = "";
  by("downloads").hidden = true;
  const speaker = by("heard-as").value;
  const fields = { model: speaker ? `${state.model}@${speaker}` : state.model, response_format: "verbose_json" };
  const answer = await call("v1/audio/transcriptions", { method: "POST", body: form({ ...fields, file }) });
  const found = await answer.json();
  by("text").value = found.text;
  for (const kind of ["txt", "srt", "vtt"]) {
    const link = by(`as-${kind}`);
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob([written(found, kind)], { type: "text/plain" }));
  }
  by("downloads").hidden = false;
  say(found.text ? "Done." : "There was no speech in it.");
}

function written({ text, segments }, kind) {
  if (kind === "txt") return `${text}\n`;
  const clock = (seconds) => new Date(1000 * seconds).toISOString().slice(11, 23).replace(".", kind === "srt" ? "," : ".");
  const cues = segments.map((s, i) => `${kind === "srt" ? `${i + 1}\n` : ""}${clock(s.start)} --> ${clock(s.end)}\n${s.text}\n\n`);
  return (kind === "vtt" ? "WEBVTT\n\n" : "") + cues.join("");
}

on("token-form", "submit", () => {
  remembered.token = by("token").value.trim();
  return load();
});
on("voice", "change", () => {
  remembered.voice = by("voice").value;
  state.again = null;
  show();
  say("");
});
on("create-form", "submit", async () => {
  const name = by("name").value.trim();
  const [file] = by("import").files;
  const identify = by("identify").checked;
  if (file) {
    await call(voicePath(name, "/profile"), { method: "PUT", body: form({ file, identify }) });
  } else {
    const body = JSON.stringify({ name, identify });
    await call("v1/speakers", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  }
  remembered.voice = name;
  by("new").open = false;
  by("create-form").reset();
  await refresh();
  by("prompt").focus();
  say(`${name} is there. Read the sentence aloud after Record, then Stop.`);
});
on("delete", "click", async () => {
  const { name } = current();
  if (!confirm(`Delete ${name}: profile, recordings and all?`)) return;
  await call(voicePath(name), { method: "DELETE" });
  await refresh();
  say(`Everything of ${name} is deleted.`);
});
on("export", "click", async () => {
  const { name } = current();
  const blob = await (await call(voicePath(name, "/profile"))).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name}.safetensors`;
  link.click();
});
on("record", "click", () => toggle("record", "level", "clock", keep));
on("skip", "click", next);
on("own-form", "submit", () => {
  state.own = by("own").value.trim();
  showPrompt();
  by("record").focus();
});
on("learn", "click", async () => {
  await call(voicePath(remembered.voice, "/learn"), { method: "POST" });
  await refresh();
  say("It is learning. This page may be closed meanwhile.");
});
on("dictate", "click", () => toggle("dictate", "dictate-level", "dictate-clock", ({ wav }) => transcribe(wav)));
on("file", "change", () => by("file").files[0] && transcribe(by("file").files[0]));

showPrompt();
load().catch((error) => by("door").hidden && warn(error));
