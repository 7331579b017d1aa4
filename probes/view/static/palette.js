// Colours. The sequential scale is viridis: even steps of lightness, so it also reads in grey and for colour-blind people.

const SEQUENTIAL = [
  "#440154",
  "#482878",
  "#3e4989",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
];
const DIVERGING = [
  "#08306b",
  "#2166ac",
  "#4393c3",
  "#92c5de",
  "#d1e5f0",
  "#f7f7f7",
  "#fddbc7",
  "#f4a582",
  "#d6604d",
  "#b2182b",
  "#67001f",
];
export const UNDEFINED = "#b9bec5";

function channels(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

/** Return the colour at a share from 0 to 1 of a scale. */
function blend(colours, share) {
  const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const lower = Math.min(Math.floor(place), colours.length - 2);
  const [from, to] = [channels(colours[lower]), channels(colours[lower + 1])];
  const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * (place - lower)));
  return `rgb(${mixed.join(",")})`;
}

/** Return the colours of a scale, from low to high. */
export function scaleStops(signed) {
  return signed ? DIVERGING : SEQUENTIAL;
}

/** Return a colour scale: from 0 to the largest value, or even around 0. */
export function colourScale(largest, signed) {
  const limit = largest > 0 ? largest : 1;
  const colour = (value) => {
    if (!Number.isFinite(value)) return UNDEFINED;
    return blend(scaleStops(signed), signed ? (value / limit + 1) / 2 : value / limit);
  };
  return { colour, low: signed ? -limit : 0, high: limit };
}

/** Return CSS for a bar of the whole scale. */
export function gradient(signed) {
  return `linear-gradient(to right, ${scaleStops(signed).join(",")})`;
}
