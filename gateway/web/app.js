// Puts the page together: status, dialogs, keys.
import { Chat } from "./chat.js";
import { watchFleet } from "./fleet.js";
import { $ } from "./dom.js";
import { defaults, read, write } from "./settings.js";

const settings = read();
const chat = new Chat(settings);

const form = $("#settings form");
function fill() {
  for (const [name, value] of Object.entries(settings)) form.elements[name].value = value;
}
form.addEventListener("input", (event) => {
  const field = event.target;
  if (!(field.name in defaults) || !field.validity.valid) return;
  const number = typeof defaults[field.name] === "number";
  if (number && field.value === "") return;
  settings[field.name] = number ? Number(field.value) : field.value;
  write(settings);
  fleet.look();
});
$("#reset").addEventListener("click", () => { Object.assign(settings, defaults); write(settings); fill(); fleet.look(); });
$("#show-settings").addEventListener("click", () => { fill(); $("#settings").showModal(); });
$("#new-chat").addEventListener("click", () => chat.clear());
$("#show-fleet").addEventListener("click", (event) => {
  const shown = document.body.classList.toggle("fleet-shown");
  event.target.setAttribute("aria-expanded", String(shown));
  event.target.textContent = shown ? "Chat" : "Fleet";
});

const question = $("#question");
const grow = () => { question.style.height = "auto"; question.style.height = `${question.scrollHeight + 2}px`; };
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("#ask").requestSubmit(); }
});
$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || chat.busy) return;
  question.value = "";
  grow();
  chat.ask(text);
});
$("#stop").addEventListener("click", () => chat.stop());
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("#settings").open) chat.stop(); });

const fleet = watchFleet(settings, (model) => { chat.model = model; });
question.focus();
