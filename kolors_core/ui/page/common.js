// What the tabs share: requests, running jobs, settings.
export const find = (selector, within = document) => within.querySelector(selector);
export const all = (selector, within = document) => [...within.querySelectorAll(selector)];
export const copyOf = id => find(`#${id}`).content.cloneNode(true);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else if (key === "text") made.textContent = value; else made[key] = value;
  }
  made.append(...children);
  return made;
}

export const addressOf = name => `/images/${name.split("/").map(encodeURIComponent).join("/")}`;

export async function ask(path, body) {
  const isImage = body instanceof Blob;
  const options = body === undefined ? {} : {
    method: "POST", body: isImage ? body : JSON.stringify(body),
    headers: { "Content-Type": isImage ? body.type || "image/png" : "application/json" },
  };
  let response;
  try { response = await fetch(path, options); } catch { throw new Error("the server does not answer: was it stopped?"); }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// A tab's place for a job: its progress, preview, errors and results.
export class Stage {
  constructor(section) {
    this.place = find(".stage", section);
    this.place.append(copyOf("running"));
    this.running = find(".running", this.place);
    this.results = find(".results", this.place);
    this.id = null;
    this.name = `job of ${section.id}`;
    find(".cancel", this.place).addEventListener("click", () => this.id && ask("/api/cancel", { id: this.id }));
  }

  show(error, notes = []) {
    const fault = find(".error", this.place), list = find(".notes", this.place);
    fault.hidden = !error;
    fault.textContent = error ?? "";
    list.hidden = !notes.length;
    list.replaceChildren(...notes.map(text => element("li", { text })));
  }

  // Give the server a job, and follow it to its end. Returns its result, or null.
  run(path, body) {
    return this.follow(async () => (await ask(path, body)).id);
  }

  // Follow the job that ran when the page was loaded again.
  async resume(show) {
    const id = sessionStorage.getItem(this.name);
    if (!id) return;
    try { await ask(`/api/job?id=${id}&version=-1`); } catch { return sessionStorage.removeItem(this.name); }
    const result = await this.follow(async () => id);
    if (result) show(result);
  }

  async follow(start) {
    this.show(null);
    this.tell({ state: "waiting", place: 0 });
    const buttons = all("button.start, dialog .again, dialog .vary", this.place.parentElement);
    buttons.forEach(button => { button.disabled = true; });
    this.running.hidden = false;
    this.running.scrollIntoView({ block: "nearest" });
    try {
      this.id = await start();
      sessionStorage.setItem(this.name, this.id);
      let version = -1, job;
      do {
        ({ version, job } = await ask(`/api/job?id=${this.id}&version=${version}`));
        this.tell(job);
      } while (["waiting", "running"].includes(job.state));
      this.show(job.state === "failed" ? job.error : null, job.notes);
      if (job.state === "cancelled") this.show("cancelled");
      return job.result;
    } catch (error) {
      this.show(error.message);
      return null;
    } finally {
      this.id = null;
      sessionStorage.removeItem(this.name);
      this.running.hidden = true;
      buttons.forEach(button => { button.disabled = false; });
    }
  }

  tell(job) {
    const told = find(".told", this.running), bar = find("progress", this.running), preview = find(".preview", this.running);
    bar.max = job.steps || 1;
    if (job.steps) bar.value = job.step; else bar.removeAttribute("value");
    if (preview.hidden && job.preview) preview.onload = () => { preview.onload = null; this.running.scrollIntoView({ block: "nearest" }); };
    preview.hidden = !job.preview;
    if (job.preview) preview.src = job.preview;
    const part = job.part ? `${job.part}, ` : "";
    if (job.state === "waiting") told.textContent = job.place ? `waiting, ${job.place} before it` : "waiting";
    else if (!job.step) told.textContent = `${part}reading the prompt`;
    else if (job.step === job.steps) told.textContent = `${part}decoding`;
    else told.textContent = `${part}step ${job.step} of ${job.steps}${job.left === null ? "" : `, ${duration(job.left)} left`}`;
  }

  images(names, kind = "") {
    this.results.replaceChildren(...names.map(name => element("figure", { class: kind },
      element("a", { href: addressOf(name), target: "_blank", title: "Open it alone" }, element("img", { src: addressOf(name), alt: "What was drawn" })),
      element("figcaption", { text: name }))));
  }
}

const duration = seconds => seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;

// The fields that all tasks have, put into a form.
export function addSettings(form, about) {
  const place = find(".settings", form);
  place.append(copyOf("settings"));
  for (const side of ["width", "height"]) find(`[name=${side}]`, place).placeholder = about.size;
  const options = (names, none) => [...(none ? [element("option", { value: "", text: none })] : []), ...names.map(name => element("option", { value: name, text: name }))];
  find("[name=sampler]", place).append(...options(about.samplers));
  find("[name=sampler]", place).value = "dpmpp-2m-karras";
  find("[name=schedule]", place).append(...options(about.schedules, "the sampler's"));
  find(".add-lora", place).addEventListener("click", () => {
    const row = copyOf("lora").firstElementChild;
    find(".remove", row).addEventListener("click", () => { row.remove(); find(".add-lora", place).focus(); });
    find(".loras", place).append(row);
    find("input", row).focus();
  });
}

// A form's request, without what is empty.
export function requestOf(form) {
  const request = {};
  for (const name of ["prompt", "negative", "width", "height", "steps", "guidance", "seed", "images", "sampler", "schedule"]) {
    const field = find(`[name=${name}]`, form);
    if (field && field.value.trim() !== "" && !field.closest("[hidden]")) request[name] = field.value.trim();
  }
  const loras = all(".lora", form).map(row => [find("[name=lora_from]", row).value.trim(), find("[name=lora_weight]", row).value || 1]);
  if (loras.some(([from]) => from)) request.lora = loras.filter(([from]) => from).map(([from, weight]) => `${from}:${weight}`);
  return request;
}

export function onSubmit(form, action) {
  form.noValidate = true;  // the library checks, and says what it wants
  form.addEventListener("submit", event => { event.preventDefault(); if (!find(".start", form).disabled) action(); });
  form.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); } });
}

export function choose(tab) {
  for (const other of all("[role=tab]")) {
    const isChosen = other === tab;
    other.setAttribute("aria-selected", isChosen);
    other.tabIndex = isChosen ? 0 : -1;
    find(`#${other.getAttribute("aria-controls")}`).hidden = !isChosen;
  }
  tab.dispatchEvent(new Event("chosen"));
}
