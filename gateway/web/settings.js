// What the user has chosen, kept in this browser.
export const defaults = { system: "", temperature: 0.7, max_tokens: 512, ttft_ms: 500, tpot_ms: 50, minutes: 5, key: "" };
const PLACE = "baton";
// What the server takes at most; a larger number that was once kept would end every look at the fleet.
const MOST = { ttft_ms: 1000000, tpot_ms: 1000000, minutes: 60 };
// Of what a key may consist; a browser sends no header with anything beyond Latin-1.
const KEY = /^[A-Za-z0-9._~+/=-]*$/;

export function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return Object.fromEntries(Object.entries(defaults).map(([name, value]) => [name, usable(name, kept[name]) ?? value]));
  } catch {
    return { ...defaults };
  }
}

function usable(name, kept) {
  if (typeof kept !== typeof defaults[name] || (name === "key" && !KEY.test(kept))) return undefined;
  return name in MOST ? Math.min(kept, MOST[name]) : kept;
}

export function write(settings) {
  try { localStorage.setItem(PLACE, JSON.stringify(settings)); } catch { /* private windows may refuse */ }
}

export const headers = (settings) => (settings.key ? { Authorization: `Bearer ${settings.key}` } : {});
