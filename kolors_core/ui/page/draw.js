// The tab that draws: from a text, an image, a part of one, its edges, or as an image prompt.
import { Stage, addSettings, addressOf, all, ask, choose, find, onSubmit, requestOf } from "./common.js";

export function startDraw(about) {
  const section = find("#draw"), form = find("form", section), stage = new Stage(section);
  const picture = find(".picture", form), place = find(".canvas", form), source = find(".source", form), edges = find(".edges", form);
  const mask = new Mask(find(".mask", form), form);
  let image = null, edgesOf = null;
  addSettings(form, about);
  find("[name=control]", form).value = about.controls[0] ?? "";
  find("[name=ip_adapter]", form).value = about.adapters[0] ?? "";

  const task = () => find("[name=task]:checked", form).value;

  function changed() {
    picture.hidden = task() === "text";
    for (const part of all("[data-task]", form)) part.hidden = !part.dataset.task.split(" ").includes(task());
    find(".mask", form).hidden = task() !== "inpaint";
    find("[name=strength]", form).placeholder = task() === "inpaint" ? "1" : "0.3";
    if (task() === "control") showEdges();
  }

  async function take(file) {
    try { use(await ask("/api/bring", file)); } catch (error) { stage.show(error.message); }
  }

  function use(brought) {
    image = brought;
    source.src = addressOf(brought.name);
    place.hidden = false;
    mask.resize(brought.width, brought.height);
    stage.show(null);
    if (task() === "control") showEdges();
  }

  async function showEdges() {
    const isMap = find("[name=is_map]", form).checked;
    find(".thresholds", form).hidden = isMap;
    edges.hidden = isMap || !image;
    edgesOf = isMap && image ? image.name : null;
    if (isMap || !image) return;
    const [low, high] = ["low", "high"].map(name => Number(find(`[name=${name}]`, form).value));
    try {
      edgesOf = (await ask("/api/edges", { image: image.name, low: Math.min(low, high), high })).name;
      edges.src = addressOf(edgesOf);
    } catch (error) { stage.show(error.message); }
  }

  const value = name => find(`[name=${name}]`, form).value.trim();

  async function draw() {
    const request = requestOf(form);
    stage.show(null);
    if (task() !== "text" && !image) return stage.show("choose an image first");
    if (task() === "image" || task() === "inpaint") {
      request.image = image.name;
      if (value("strength")) request.strength = value("strength");
    }
    try {
      if (task() === "inpaint") {
        if (mask.isEmpty()) return stage.show("paint the part to draw anew first");
        request.mask = (await ask("/api/bring", await mask.blob())).name;
      }
      if (task() === "control") {
        if (!edgesOf) await showEdges();
        Object.assign(request, { control: `${value("control")}:${value("control_scale") || 0.8}`, control_image: edgesOf });
      }
    } catch (error) { return stage.show(error.message); }
    if (task() === "prompt") Object.assign(request, { ip_image: image.name, ip_adapter: value("ip_adapter"), ip_scale: value("ip_scale") || 1 });
    const result = await stage.run("/api/draw", { request });
    if (result) stage.images(result.images);
  }

  find(".task", form).addEventListener("change", changed);
  find("[name=file]", form).addEventListener("change", event => event.target.files[0] && take(event.target.files[0]));
  for (const name of ["low", "high", "is_map"]) find(`[name=${name}]`, form).addEventListener("change", showEdges);
  form.addEventListener("dragover", event => { event.preventDefault(); picture.classList.add("drop"); });
  form.addEventListener("dragleave", () => picture.classList.remove("drop"));
  form.addEventListener("drop", event => {
    event.preventDefault();
    picture.classList.remove("drop");
    if (event.dataTransfer.files[0] && task() !== "text") take(event.dataTransfer.files[0]);
  });
  // A file that is dropped beside the form would be opened in place of the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, event => event.preventDefault());
  document.addEventListener("paste", event => {
    const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
    if (file && !section.hidden && task() !== "text") take(file);
  });
  onSubmit(form, draw);
  changed();
  stage.resume(result => stage.images(result.images));

  // Start from an image of the history.
  return async name => {
    if (task() === "text") find("[name=task][value=image]", form).checked = true;
    changed();
    await take(await (await fetch(addressOf(name))).blob());
    choose(find("#tab-draw"));
    find("[name=prompt]", form).focus();
  };
}

const PAINT = "#e3f";  // seen on a white image too

// A mask that is painted over the image, by the pointer or the keyboard.
class Mask {
  constructor(canvas, form) {
    this.canvas = canvas;
    this.form = form;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.last = null;
    canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); this.last = null; this.paint(this.at(event)); });
    canvas.addEventListener("pointermove", event => { this.isOver = true; if (event.buttons) this.paint(this.at(event)); else { this.cursor = this.at(event); this.show(); } });
    canvas.addEventListener("pointerleave", () => { this.isOver = false; this.show(); });
    canvas.addEventListener("keydown", event => this.key(event));
    canvas.addEventListener("focus", () => this.show());
    canvas.addEventListener("blur", () => this.show());
    find(".clear", form).addEventListener("click", () => { this.context.clearRect(0, 0, canvas.width, canvas.height); this.keep(); });
    find(".fill", form).addEventListener("click", () => { this.context.fillStyle = PAINT; this.context.fillRect(0, 0, canvas.width, canvas.height); this.keep(); });
  }

  resize(width, height) {
    Object.assign(this.canvas, { width, height });
    this.cursor = { x: width / 2, y: height / 2 };
    this.painted = null;
  }

  get radius() { return find("[name=brush]", this.form).value / 200 * Math.min(this.canvas.width, this.canvas.height); }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width * this.canvas.width, y: (event.clientY - box.top) / box.height * this.canvas.height };
  }

  paint(point, isErased = find("[name=erase]", this.form).checked) {
    this.restore();
    const pen = this.context;
    pen.globalCompositeOperation = isErased ? "destination-out" : "source-over";
    Object.assign(pen, { strokeStyle: PAINT, lineWidth: 2 * this.radius, lineCap: "round", lineJoin: "round" });
    pen.beginPath();
    pen.moveTo((this.last ?? point).x, (this.last ?? point).y);
    pen.lineTo(point.x + .01, point.y);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
    this.last = this.cursor = point;
    this.keep();
  }

  key(event) {
    const step = Math.max(1, this.radius / 2), moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      const [x, y] = moves[event.key];
      this.cursor = { x: Math.min(this.canvas.width, Math.max(0, this.cursor.x + x)), y: Math.min(this.canvas.height, Math.max(0, this.cursor.y + y)) };
    } else if (event.key === " " || event.key === "Backspace") {
      this.last = null;
      this.paint(this.cursor, event.key === "Backspace");
    } else return;
    event.preventDefault();
    this.show();
  }

  keep() { this.painted = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height); }

  restore() { if (this.painted) this.context.putImageData(this.painted, 0, 0); else this.context.clearRect(0, 0, this.canvas.width, this.canvas.height); }

  // Show the brush where the pointer or the keyboard has it, which is no part of the mask.
  show() {
    if (!this.canvas.width || !this.cursor) return;
    this.restore();
    if (!this.isOver && !this.canvas.matches(":focus-visible")) return;
    for (const [strokeStyle, width] of [["#000", 3], ["#fff", 1]]) {  // seen on any image
      Object.assign(this.context, { strokeStyle, lineWidth: width * Math.max(1, this.canvas.width / 400) });
      this.context.beginPath();
      this.context.arc(this.cursor.x, this.cursor.y, this.radius, 0, 7);
      this.context.stroke();
    }
  }

  isEmpty() { return !this.painted || !this.painted.data.some(byte => byte); }

  // White where it is painted, black elsewhere.
  blob() {
    const flat = document.createElement("canvas");
    Object.assign(flat, { width: this.canvas.width, height: this.canvas.height });
    const pen = flat.getContext("2d");
    pen.putImageData(this.painted, 0, 0);
    for (const [operation, color] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      Object.assign(pen, { globalCompositeOperation: operation, fillStyle: color });
      pen.fillRect(0, 0, flat.width, flat.height);
    }
    return new Promise(done => flat.toBlob(done, "image/png"));
  }
}
