// The tab of what was drawn, from the images themselves.
import { Stage, ask, element, find } from "./common.js";

const NAMES = { negative_prompt: "not", guidance_scale: "guidance", sheet: "sheet" };

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
      find("#count").textContent = found.all ? `${found.all} images` : "Nothing was drawn yet.";
    } catch (error) { stage.show(error.message); }
  }

  function card(image) {
    const text = image.prompt || image.error || image.name;
    const button = element("button", { type: "button", title: text }, element("img", { src: `/images/${image.name}`, alt: "", loading: "lazy" }), element("span", { text }));
    button.addEventListener("click", () => open(image));
    return button;
  }

  function open(image) {
    shown = image;
    find("img", dialog).src = `/images/${image.name}`;
    find("img", dialog).alt = image.prompt ?? image.name;
    find("h2", dialog).textContent = image.name;
    fault.hidden = true;
    const facts = Object.entries(image).filter(([name]) => !["name", "can_be_drawn"].includes(name));
    find("dl", dialog).replaceChildren(...facts.flatMap(([name, value]) => [element("dt", { text: NAMES[name] ?? name.replace("_", " ") }), element("dd", { text: value })]));
    for (const kind of [".again", ".vary"]) find(kind, dialog).hidden = !image.can_be_drawn && !image.sheet;
    dialog.showModal();
  }

  async function draw(changes) {
    dialog.close();
    const { axes, ...request } = JSON.parse(shown.sheet ?? "{}");
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
  find("#tab-history").addEventListener("chosen", () => load(0));
}
