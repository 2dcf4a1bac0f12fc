// A dashboard is added below as a literal, so that the compiler refuses keys that Grafana does not know.
import type { Dashboard as AnyDashboard, GraphFieldConfig, Panel as AnyPanel } from "@grafana/schema";
import type { Options as StatOptions } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type { Options as TableOptions } from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type { Options as TimeSeriesOptions } from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// In JSON an enum is its value.
type Json<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Json<T[K]> } : T;

interface Target {
  refId: string;
  datasource: { type: "prometheus"; uid: string };
  expr: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
  format: "table" | "time_series" | "heatmap";
}

interface Of<Kind extends string, Options, Custom> extends Omit<Json<AnyPanel<Options, Custom>>, "type" | "options" | "targets" | "fieldConfig"> {
  id: number;
  type: Kind;
  options: Json<Options>;
  targets: Target[];
  fieldConfig: {
    defaults: Omit<NonNullable<Json<AnyPanel>["fieldConfig"]>["defaults"], "custom"> & { custom?: Json<Custom> };
    overrides: never[];
  };
}

type Panel =
  | Of<"timeseries", TimeSeriesOptions, GraphFieldConfig>
  | Of<"stat", StatOptions, never>
  | Of<"table", TableOptions, never>;

interface Dashboard extends Omit<Json<AnyDashboard>, "panels"> {
  panels: Panel[];
}

