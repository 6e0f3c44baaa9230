// The tab of what was drawn, from the images themselves.
import { Stage, addressOf, ask, element, find } from "./common.js";

const NAMES = { guidance_scale: "guidance" };
const AXES = ["columns", "rows", "tables"];

export function startHistory(startFrom) {
  const section = find("#history"), stage = new Stage(section), list = find(".gallery", section), more = find(".more", section);
  const dialog = find("dialog", section), fault = find(".error", dialog);
  let shown = null;

  async function load(start) {
    try {
      const found = await ask(`/api/images?start=${start}`);
      const items = found.images.map(image => element("li", {}, card(image)));
      if (start) list.append(...items); else list.replaceChildren(...items);
      more.hidden = !found.more;
      find("#count").textContent = found.all ? `${found.all} image${found.all === 1 ? "" : "s"}` : "Nothing was drawn yet.";
    } catch (error) { stage.show(error.message); }
  }

  function card(image) {
    const text = image.prompt || image.error || image.name;
    const button = element("button", { type: "button", title: text }, element("img", { src: addressOf(image.name), alt: "", loading: "lazy" }), element("span", { text }));
    button.addEventListener("click", () => open(image));
    return button;
  }

  function open(image) {
    shown = image;
    find("img", dialog).src = addressOf(image.name);
    find("img", dialog).alt = image.prompt ?? image.name;
    find("h2", dialog).textContent = image.name;
    fault.hidden = true;
    const { name, can_be_drawn, sheet, ...facts } = image;
    const { axes, ...request } = sheetOf(image);
    axes?.forEach((axis, i) => { facts[AXES[i]] = `${axis.name.replace("_", " ")} ${axis.values.join(", ")}`; });
    Object.assign(facts, request);
    find("dl", dialog).replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", { text: NAMES[name] ?? name.replace("_", " ") }), element("dd", { text: value })]));
    for (const kind of [".again", ".vary"]) find(kind, dialog).hidden = !image.can_be_drawn && !axes;
    dialog.showModal();
  }

  // What a sheet says of itself: a request and its axes; nothing if it is no sheet, or another program wrote it.
  function sheetOf(image) {
    try {
      const sheet = JSON.parse(image.sheet ?? "{}");
      return sheet.axes?.every(axis => typeof axis.name === "string" && Array.isArray(axis.values)) ? sheet : {};
    } catch { return {}; }
  }

  async function draw(changes) {
    dialog.close();
    const { axes, ...request } = sheetOf(shown);
    const seed = axes?.some(axis => axis.name === "seed") ? {} : changes;  // a sheet of seeds has them all
    const result = axes ? await stage.run("/api/compare", { request: { ...request, ...seed }, axes })
      : await stage.run("/api/draw", { request: { from: shown.name, ...changes } });
    if (result) { stage.images(result.images); load(0); }
  }

  find(".again", dialog).addEventListener("click", () => draw({}));
  find(".vary", dialog).addEventListener("click", () => draw({ seed: String(Math.floor(Math.random() * 2 ** 32)) }));
  find(".use", dialog).addEventListener("click", () => { dialog.close(); startFrom(shown.name); });
  find(".close", dialog).addEventListener("click", () => dialog.close());
  more.addEventListener("click", () => load(list.children.length));
  stage.resume(result => stage.images(result.images));
  find("#tab-history").addEventListener("chosen", () => load(0));
}
