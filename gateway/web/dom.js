// A few words for making elements. Text is always set as text, never as HTML.
export const $ = (selector, within = document) => within.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Paragraphs, and code between lines of ```.
export function prose(text) {
  const parts = [];
  text.split(/^```.*$/m).forEach((part, index) => {
    if (index % 2) parts.push(make("pre", {}, make("code", { textContent: part.replace(/^\n|\n$/g, "") })));
    else parts.push(...part.split(/\n{2,}/).filter((one) => one.trim()).map((one) => make("p", { textContent: one.trim() })));
  });
  return parts;
}

export const ms = (value) => (value >= 10000 ? `${(value / 1000).toFixed(1)} s` : value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`);
