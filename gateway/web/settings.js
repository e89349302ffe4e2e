// What the user has chosen, kept in this browser.
export const defaults = { system: "", temperature: 0.7, max_tokens: 512, ttft_ms: 500, tpot_ms: 50, minutes: 5, key: "" };
const PLACE = "baton";

export function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return Object.fromEntries(Object.entries(defaults).map(([name, value]) => [name, typeof kept[name] === typeof value ? kept[name] : value]));
  } catch {
    return { ...defaults };
  }
}

export function write(settings) {
  try { localStorage.setItem(PLACE, JSON.stringify(settings)); } catch { /* private windows may refuse */ }
}

export const headers = (settings) => (settings.key ? { Authorization: `Bearer ${settings.key}` } : {});
