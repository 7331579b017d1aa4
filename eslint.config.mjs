// Rules for the page's modules: `make lint-js`.
import js from "@eslint/js";
import globals from "globals";

export default [
  { files: ["probes/view/static/*.js"], ...js.configs.recommended, languageOptions: { globals: globals.browser } },
];
