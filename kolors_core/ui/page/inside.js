// The tab that looks inside: where each token acted, and what a layer computes.
import { Stage, addSettings, addressOf, all, element, find, onSubmit, requestOf } from "./common.js";

export function startInside(about) {
  const section = find("#inside"), form = find("form", section), stage = new Stage(section);
  const layer = find("[name=layer]", form), step = find("[name=step]", form);
  addSettings(form, about);
  find(".images", form).hidden = true;
  layer.max = about.layers.length - 1;
  layer.value = Math.floor(about.layers.length * .8);  // of the up path, where an image is seen
  const what = () => find("[name=what]:checked", form).value;

  function changed() {
    find(".layer", form).hidden = what() !== "features";
    for (const part of all(".loras, .add-lora", form)) part.hidden = what() !== "features";
    step.max = find("[name=steps]", form).value || 25;
    const [name, number] = all(".layer output", form);
    name.textContent = about.layers[layer.value];
    number.textContent = step.value;
  }

  const show = result => result && stage.results.replaceChildren(result.views ? tokens(result) : features(result));

  stage.resume(show);
  form.addEventListener("input", changed);
  changed();
  onSubmit(form, async () => {
    const request = requestOf(form);
    if (what() === "features") {
      show(await stage.run("/api/features", { request, layer: about.layers[layer.value], step: Number(step.value) }));
    } else {
      delete request.lora;
      show(await stage.run("/api/explain", { request }));
    }
  });
}

function features(result) {
  return element("div", { class: "look" },
    element("img", { src: addressOf(result.image), alt: "What was drawn" }),
    element("p", { class: "hint", text: `${result.layer}: ${result.size}. Its three main directions as red, green and blue:` }),
    element("img", { class: "main", src: result.main, alt: "The main directions of the features" }),
    element("p", { class: "hint", text: "The channels that vary most, each from its least (dark) to its most:" }),
    element("div", { class: "channels" }, ...result.channels.map(one => element("figure", {},
      element("img", { src: one.map, alt: `Channel ${one.number}` }), element("figcaption", { text: String(one.number) })))));
}

function tokens(result) {
  const views = Object.keys(result.views).map(key => key.split("|"));
  const parts = [...new Set(views.map(([part]) => part))], spans = [...new Set(views.map(([, span]) => span))];
  const drawn = element("img", { class: "drawn", src: addressOf(result.image), alt: "What was drawn" }), map = element("img", { class: "map", alt: "" });
  const overlay = element("div", { class: "overlay" }, drawn, map);
  const slider = (text, max, value) => element("input", { type: "range", min: 0, max, value, ariaLabel: text });
  const layers = slider("Layers", parts.length - 1, 0), steps = slider("Steps", spans.length - 1, 0), strength = slider("Strength of the map", 100, 60);
  const told = element("p", { role: "status" }), names = [element("output"), element("output")];
  const buttons = result.tokens.map((token, i) => element("button", { type: "button", text: token.label, title: token.pieces }));
  let chosen = buttons.length - 1;

  function show() {
    const part = parts[layers.value], span = spans[steps.value], view = result.views[`${part}|${span}`];
    map.src = view.maps[chosen];
    map.style.opacity = strength.value / 100;
    overlay.classList.toggle("on", strength.value > 0);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
    names[0].textContent = result.parts[part];
    names[1].textContent = span === "all" ? "all steps" : `steps ${span}`;
    told.textContent = `“${result.tokens[chosen].label}”: ${(100 * view.shares[chosen]).toFixed(1)}% of the attention`;
  }

  buttons.forEach((button, i) => {
    for (const kind of ["click", "focus", "pointerenter"]) button.addEventListener(kind, () => { chosen = i; show(); });
  });
  for (const one of [layers, steps, strength]) one.addEventListener("input", show);
  show();
  return element("div", { class: "look" },
    element("div", { class: "tokens" }, ...buttons), overlay, told,
    element("label", { class: "wide" }, "Attention of ", names[0], layers), element("label", { class: "wide" }, "In ", names[1], steps),
    element("label", { class: "wide" }, "Strength of the map", strength));
}
