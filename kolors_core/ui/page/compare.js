// The tab that compares: a sheet of images over one, two or three settings.
import { Stage, addSettings, all, element, find, onSubmit, requestOf } from "./common.js";

// Values of an axis that was chosen.
const EXAMPLES = {
  prompt: "a red apple | a red car", seed: "1, 2, 3", steps: "4, 8, 25", guidance: "1, 3, 5", lora_weight: "0, 0.5, 1",
  sampler: "euler, dpmpp-2m-karras, unipc", schedule: "trailing, exponential, beta",
};

export function startCompare(about) {
  const section = find("#compare"), form = find("form", section), stage = new Stage(section);
  addSettings(form, about);
  find(".images", form).hidden = true;
  for (const [i, select] of all("[name=axis]", form).entries()) {
    if (i) select.append(element("option", { value: "", text: "none" }));
    select.append(...about.axes.map(name => element("option", { value: name, text: name.replace("_", " ") })));
    select.value = ["seed", "guidance", ""][i];
    select.addEventListener("change", () => { all("[name=values]", form)[i].value = EXAMPLES[select.value] ?? ""; changed(); });
  }
  changed();

  // A setting that differs is not the form's, and names are listed.
  function changed() {
    const chosen = all("[name=axis]", form).map(select => select.value);
    for (const name of about.axes) if (find(`[name=${name}]`, form)) find(`[name=${name}]`, form).disabled = name !== "prompt" && chosen.includes(name);
    const lists = { sampler: about.samplers, schedule: about.schedules, lora_weight: ["the weight of the first LoRA"] };
    find(".names", form).textContent = chosen.filter(name => lists[name]).map(name => `${name.replace("_", " ")}: ${lists[name].join(", ")}.`).join(" ");
  }

  function axes() {
    const values = all("[name=values]", form).map(input => input.value);
    return all("[name=axis]", form).map((select, i) => ({ name: select.value, values: split(select.value, values[i]) })).filter(axis => axis.name);
  }

  const split = (name, text) => text.split(name === "prompt" ? "|" : ",").map(value => value.trim()).filter(Boolean);

  stage.resume(result => stage.images(result.images, "sheet"));
  onSubmit(form, async () => {
    const request = requestOf(form);
    if (!request.seed) request.seed = String(Math.floor(Math.random() * 2 ** 32));  // one for all cells
    for (const axis of axes()) if (axis.name !== "lora_weight") delete request[axis.name];
    const result = await stage.run("/api/compare", { request: { ...request, prompt: find("[name=prompt]", form).value.trim() }, axes: axes() });
    if (result) stage.images(result.images, "sheet");
  });
}
